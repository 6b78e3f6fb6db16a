"""How one weight lies on disk: a Zarr 3 array in one file, uncompressed, cut along one axis.

In Zarr's words the file is a single shard (codec ``sharding_indexed``): chunk after chunk, then an
index of (offset, bytes) pairs. The chunks cut the axis that meshes split, in as many pieces as a
mesh could need, so that every device's slice is one run of bytes; a reader needs nothing but the
offsets, and Orbax and TensorStore read the same files (Zarr v3 specification, sharding codec 1.0).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np

MOST_CHUNKS = 128  # as many pieces as the largest degree needs; there are at least half as many
NUMPY = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_ZEROS = bytes(1 << 16)


@dataclass(frozen=True)
class Layout:
    """A weight of ``shape`` (one or two axes), cut along ``axis`` every ``width`` elements.

    The last chunk is as large as the others; what it lacks is zero.
    """

    shape: tuple[int, ...]
    dtype: str
    axis: int
    width: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: str, axis: int, unit: int) -> "Layout":
        """The finest useful cut: ``unit`` elements (a head, say) stay together, and there are at
        most `MOST_CHUNKS` chunks, as many powers of two among their number's divisors as possible.
        """
        size = shape[axis]
        if size % unit:
            unit = 1
        units = size // unit
        if units > MOST_CHUNKS:
            twos = min(units & -units, MOST_CHUNKS)
            odd = max(n for n in range(1, MOST_CHUNKS // twos + 1) if units // twos % n == 0)
            # Only awkward sizes, which no larger power of two divides, end within a chunk.
            even = twos * odd >= MOST_CHUNKS // 2
            unit *= units // (twos * odd) if even else -(-units // MOST_CHUNKS)
        return cls(shape, dtype, axis, unit)

    @property
    def chunks(self) -> int:
        return -(-self.shape[self.axis] // self.width)

    @property
    def itemsize(self) -> int:
        return NUMPY[self.dtype].itemsize

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one element of the first axis."""
        return math.prod(self.shape[1:]) * self.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the weight itself."""
        return self.rows * self.row_bytes

    @cached_property
    def chunk_shape(self) -> tuple[int, ...]:
        return tuple(self.width if a == self.axis else n for a, n in enumerate(self.shape))

    @cached_property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk_shape) * self.itemsize

    @property
    def data_bytes(self) -> int:
        return self.chunks * self.chunk_bytes

    @property
    def file_bytes(self) -> int:
        return self.data_bytes + len(self.index)

    @property
    def file(self) -> str:
        """The file's name below the array's folder, by Zarr's default chunk keys."""
        return "/".join(["c"] + ["0"] * len(self.shape))

    @cached_property
    def index(self) -> bytes:
        """The end of the file: where each chunk lies."""
        begin = np.arange(self.chunks, dtype="<u8") * np.uint64(self.chunk_bytes)
        return np.stack([begin, np.full_like(begin, self.chunk_bytes)], axis=1).tobytes()

    @cached_property
    def zarr_json(self) -> bytes:
        """The array's metadata file."""
        little = [{"name": "bytes", "configuration": {"endian": "little"}}]
        whole = list(self.shape)
        whole[self.axis] = self.chunks * self.width
        sharding = {
            "chunk_shape": list(self.chunk_shape),
            "codecs": little,
            "index_codecs": little,
            "index_location": "end",
        }
        about = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "fill_value": 0.0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        return json.dumps(about).encode()

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(chunk, offset in the file, bytes) of the pieces that rows ``first`` to ``first + count``
        consist of, in the order of `cut`."""
        if self.axis == 0:
            row = first
            while row < first + count:
                chunk = row // self.width
                end = min(first + count, (chunk + 1) * self.width)
                yield chunk, row * self.row_bytes, (end - row) * self.row_bytes
                row = end
        else:
            piece = self.width * self.itemsize
            for chunk in range(self.chunks):
                yield chunk, chunk * self.chunk_bytes + first * piece, count * piece

    def cut(self, rows: np.ndarray, scratch: np.ndarray) -> np.ndarray:
        """Whole rows, ``uint8 [n, row_bytes]``, as the bytes of their `runs` joined.

        The result lies in ``scratch`` (bytes, at least `cut_bytes` of n) if they have to move.
        """
        if self.axis == 0:
            return rows.reshape(-1)
        strips, whole = self._strips(scratch, len(rows))
        np.copyto(strips[:whole], self._columns(rows, whole))
        if whole < self.chunks:
            rest = rows[:, whole * self.width * self.itemsize :]
            last = strips[-1].view(np.uint8)
            last[:, rest.shape[1] :] = 0
            last[:, : rest.shape[1]] = rest
        return scratch[: self.cut_bytes(len(rows))]

    def join(self, scratch: np.ndarray, rows: np.ndarray) -> None:
        """Undo `cut`: the bytes of the runs, in ``scratch``, back into ``rows``."""
        if self.axis == 0:
            rows.reshape(-1)[:] = scratch[: rows.size]
            return
        strips, whole = self._strips(scratch, len(rows))
        np.copyto(self._columns(rows, whole), strips[:whole])
        if whole < self.chunks:
            rest = rows[:, whole * self.width * self.itemsize :]
            rest[...] = strips[-1].view(np.uint8)[:, : rest.shape[1]]

    def cut_bytes(self, count: int) -> int:
        """Bytes of `cut` of ``count`` rows: a little more than theirs where the last chunk is
        not full."""
        if self.axis == 0:
            return count * self.row_bytes
        return count * self.chunks * self.width * self.itemsize

    @property
    def row_buffers(self) -> tuple[int, int]:
        """Bytes that each row takes as it is and, if it has to move for that, as cut."""
        return self.row_bytes, self.cut_bytes(1) if self.axis else 0

    def padding(self) -> Iterator[tuple[int, bytes]]:
        """(offset, zeros) that fill up the last chunk after the last row."""
        at = self.nbytes if self.axis == 0 else self.data_bytes
        while at < self.data_bytes:
            zeros = _ZEROS[: self.data_bytes - at]
            yield at, zeros
            at += len(zeros)

    def _strips(self, scratch: np.ndarray, count: int) -> tuple[np.ndarray, int]:
        """``scratch`` as [chunk, row, words of a piece], and how many of the chunks are full."""
        flat = scratch[: self.cut_bytes(count)].view(self._word)
        return flat.reshape(self.chunks, count, -1), self.shape[1] // self.width

    def _columns(self, rows: np.ndarray, whole: int) -> np.ndarray:
        """The columns of the full chunks as [chunk, row, words of a piece]."""
        words = rows[:, : whole * self.width * self.itemsize].view(self._word)
        return words.reshape(len(rows), whole, -1).transpose(1, 0, 2)

    @cached_property
    def _word(self) -> np.dtype:
        """The widest unsigned word that rows and pieces consist of: numpy copies words."""
        return np.dtype(f"u{math.gcd(self.width * self.itemsize, self.row_bytes, 8)}")
