"""Where a CPU's weights lie: side by side in one piece of memory, on huge pages where the system
has them. On pages of four kilobytes less is read in the same time (BENCHMARKS.md).
"""

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence

import numpy as np

ALIGNED = 64  # bytes: what a CPU device takes over as it is
_HUGE = 1 << 21

Empty = Callable[[tuple[int, ...], np.dtype], np.ndarray]


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array of its own, which a CPU device takes over as it is."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)


class Room:
    """Memory for arrays that stay, given out from its beginning to its end. It is the system's
    again once none of them is left."""

    def __init__(self, sizes: Sequence[int]):
        """``sizes``: bytes of each array that will be asked for."""
        total = sum(-(-size // ALIGNED) * ALIGNED for size in sizes) + _HUGE
        private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
        pages = mmap.mmap(-1, total, flags=private) if private else mmap.mmap(-1, total)
        with contextlib.suppress(AttributeError, OSError):  # only Linux has it, and may not want to
            pages.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(pages, np.uint8)
        self._next = -self._bytes.ctypes.data % _HUGE

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The next array, all zeros; one of its own where there is no room left."""
        size = math.prod(shape) * dtype.itemsize
        start, end = self._next, self._next + size
        if end > len(self._bytes):
            return aligned(shape, dtype)
        self._next = -(-end // ALIGNED) * ALIGNED
        return self._bytes[start:end].view(dtype).reshape(shape)
