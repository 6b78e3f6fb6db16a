"""Where a CPU's weights lie: side by side in one piece of memory, on huge pages where the system
has them. On pages of four kilobytes less is read in the same time (BENCHMARKS.md).

A system clears memory before it gives it away, and a virtual machine may first have to get it back
from its host: seconds, for gigabytes. A command that knows how much it will need has that done
`ahead`, while imports leave cores idle.
"""

import contextlib
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tpjax import host

ALIGNED = 64  # bytes: what a CPU device takes over as it is
_HUGE = 1 << 21
_PAGE = 1 << 12
_PIECE = 1 << 25  # bytes a thread gets at a time, between two looks at whether it shall stop
_WORTH_IT = 1 << 28  # bytes; less is there in no time
_MOST_THREADS = 4

Empty = Callable[[tuple[int, ...], np.dtype], np.ndarray]


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array of its own, which a CPU device takes over as it is."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)


class Room:
    """Memory for arrays that stay, given out from its beginning to its end: what was got `ahead`,
    if that is enough. It is the system's again once none of them is left."""

    def __init__(self, sizes: Sequence[int]):
        """``sizes``: bytes of each array that will be asked for."""
        total = sum(-(-size // ALIGNED) * ALIGNED for size in sizes) + _HUGE
        self._bytes = np.frombuffer(_got(total) or _pages(total), np.uint8)
        self._next = -self._bytes.ctypes.data % _HUGE

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The next array, all zeros; one of its own where there is no room left."""
        size = math.prod(shape) * dtype.itemsize
        start, end = self._next, self._next + size
        if end > len(self._bytes):
            return aligned(shape, dtype)
        self._next = -(-end // ALIGNED) * ALIGNED
        return self._bytes[start:end].view(dtype).reshape(shape)


def _pages(total: int) -> mmap.mmap:
    private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    pages = mmap.mmap(-1, total, flags=private) if private else mmap.mmap(-1, total)
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it, and may not want to
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class _Ahead:
    """Pages that threads touch, one piece after the other, until they are stopped."""

    def __init__(self, size: int):
        self.pages = _pages(size + size // 16 + 2 * _HUGE)  # some models are padded a little
        self._bytes = np.frombuffer(self.pages, np.uint8)
        self._starts = iter(range(0, size, _PIECE))  # all threads take theirs from it
        self._touched: list[int] = []
        self._stopped = threading.Event()
        count = max(1, min(_MOST_THREADS, (os.cpu_count() or 1) - 1))  # one is the imports'
        self._threads = [threading.Thread(target=self._touch, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _touch(self) -> None:
        for start in self._starts:
            if self._stopped.is_set():
                return
            self._bytes[start : start + _PIECE : _PAGE] = 0
            self._touched.append(start)

    @property
    def bytes(self) -> int:
        return len(self._touched) * _PIECE

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


_ahead: _Ahead | None = None


@contextlib.contextmanager
def ahead(size: int) -> Iterator[None]:
    """Have the memory for so many bytes got, while what is in here runs up to the first `Room`.
    What no room has taken goes back at the end. Nothing happens for a few bytes, or where so many
    are half of what is free."""
    global _ahead
    if _WORTH_IT <= size <= host.free_memory() // 2:
        with contextlib.suppress(OSError, ValueError):  # not so much at once
            _ahead = _Ahead(size)
    try:
        yield
    finally:
        _got(0)


def got_ahead() -> int:
    """Bytes that are there for the next room."""
    return _ahead.bytes if _ahead else 0


def _got(total: int) -> mmap.mmap | None:
    """The pages that are there, if they are enough; those behind ``total`` are given back."""
    global _ahead
    if _ahead is None:
        return None
    found, _ahead = _ahead, None
    found.stop()
    if total > len(found.pages):
        return None
    # Only Linux has it, and there may be no page behind it.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        found.pages.madvise(mmap.MADV_DONTNEED, -(-total // _HUGE) * _HUGE)
    return found.pages
