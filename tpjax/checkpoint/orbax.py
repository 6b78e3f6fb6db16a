"""Reading a tpjax checkpoint: an Orbax checkpoint whose every byte the manifest vouches for.

The chunks are plain bytes (see `layout`), so they are read straight to where they are needed, about
seven times as fast as by Orbax itself (BENCHMARKS.md), which reads the same files.
"""

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import xxhash

from tpjax.checkpoint.layout import NUMPY
from tpjax.checkpoint.manifest import DAMAGED, MANIFEST, Manifest, Weight
from tpjax.checkpoint.safetensors import WORDS, TensorInfo, one_line, opened, read_exactly
from tpjax.checkpoint.tensors import Bounds, Tensor
from tpjax.errors import CheckpointError, UsageError

Verify = Literal["fast", "full"]
_SAMPLE = 32  # chunks that "fast" reads, others at every start


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a finished tpjax checkpoint, whatever its state."""
    return (folder / MANIFEST).is_file()


def check_verify(verify: object) -> None:
    """Raise UsageError for what is no way to verify."""
    if verify not in get_args(Verify):
        raise UsageError(f"verify={verify!r}: known are {', '.join(get_args(Verify))}")


class OrbaxFolder:
    """The weights of a tpjax checkpoint, by path, as slices.

    ``verify``: "fast" checks the manifest, every size, every small file and a sample of the chunks
    now; "full" also checks each chunk when it is read; None only reads the manifest. Raises
    CheckpointError naming the weight and the file of what is wrong.
    """

    def __init__(self, folder: Path, verify: Verify | None = "fast"):
        self.folder, self.verify = folder, verify
        self._opened_as = self._identity()
        self.manifest = Manifest.read(folder)
        self.weights = {weight.path: weight for weight in self.manifest.weights}
        self.finite = all(weight.finite for weight in self.manifest.weights)
        self.tensors = {
            path: TensorInfo(folder / w.file, w.shape, WORDS[w.dtype])
            for path, w in self.weights.items()
        }
        self.bytes_read = 0
        self._lock = threading.Lock()
        if verify is not None:
            check_verify(verify)
            if problems := list(self.check()):
                raise CheckpointError(problems[0])
            self.bytes_read = 0

    def key(self, tensor: Tensor) -> str:
        """What a tensor is called here."""
        return tensor.path

    def check_unchanged(self) -> None:
        """Raise CheckpointError if another checkpoint took this one's place since it was opened:
        what was read then is of two."""
        if self._identity() != self._opened_as:
            raise CheckpointError(f"{self.folder}: was replaced while it was read; load it again")

    def _identity(self) -> tuple[int, int] | None:
        try:
            stat = os.stat(self.folder / MANIFEST)
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def check(self) -> Iterator[str]:
        """A line for everything that is wrong, as far as can be told without reading all data: the
        files, and a sample of the chunks of those weights whose file is sound."""
        yield from self.check_files()
        framed = {path: self.frame(weight) for path, weight in self.weights.items()}
        yield from filter(None, framed.values())
        sound = [weight for path, weight in self.weights.items() if framed[path] is None]
        chunks = [(w, n) for w in sound for n in range(w.layout.chunks)]
        for weight, chunk in random.SystemRandom().sample(chunks, min(_SAMPLE, len(chunks))):
            try:
                with self._opened(weight) as fd:
                    self._chunk(fd, weight, chunk)
            except CheckpointError as error:
                yield str(error)

    def check_files(self) -> Iterator[str]:
        """A line for every small file that is missing or not what the manifest lists."""
        for name, info in self.manifest.files.items():
            yield from self._check_file(name, info)

    def _check_file(self, name: str, info) -> Iterator[str]:
        path = self.folder / name
        try:
            if not path.is_file():  # a pipe would not end
                yield f"{path}: no such file; {DAMAGED}"
                return
            content = path.read_bytes() if path.stat().st_size == info.bytes else b""
        except (OSError, ValueError) as error:
            yield f"{path}: {one_line(error)}; {DAMAGED}"
            return
        if (len(content), xxhash.xxh3_128_hexdigest(content)) != (info.bytes, info.digest):
            yield f"{path}: not the file the manifest lists (damaged or edited); {DAMAGED}"

    def frame(self, weight: Weight) -> str | None:
        """What is wrong with a weight's file as a file: missing, of another size, or with another
        index at its end. Its data is not read."""
        layout, path = weight.layout, self.folder / weight.file
        try:
            size = os.path.getsize(path)
            if size != layout.file_bytes:
                return f"{path}: {size} bytes, {weight.path} needs {layout.file_bytes}; {DAMAGED}"
            index = np.empty(len(layout.index), np.uint8)
            with self._opened(weight) as fd:
                read_exactly(fd, layout.data_bytes, index, path)
        except OSError as error:
            return f"{path}: {error.strerror or error} ({weight.path}); {DAMAGED}"
        except CheckpointError as error:
            return str(error)
        if index.tobytes() != layout.index:
            return f"{path}: {weight.path} is damaged in its index; {DAMAGED}"
        return None

    def grain(self, path: str) -> tuple[int, int]:
        """Along which axis, and at multiples of what, to divide a slice between threads: then no
        chunk is read twice."""
        layout = self.weights[path].layout
        return layout.axis, layout.width

    def parts(
        self, path: str, bounds: Bounds, out: np.ndarray
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray | None]]:
        """A slice of one weight, piece by piece: (where in the slice, values as stored).

        Where ``out`` has the stored dtype and a piece lies in it as in the file, the piece is read
        straight to there, and None stands for its values.
        """
        weight = self.weights[path]
        layout = weight.layout
        axis, width = layout.axis, layout.width
        low, high = bounds[axis]
        direct = axis == 0 and out.dtype == NUMPY[layout.dtype] and out.flags.c_contiguous
        direct = direct and out.shape[1:] == layout.shape[1:]
        with self._opened(weight) as fd:
            for chunk in range(low // width, -(-high // width)):
                a, b = max(low, chunk * width), min(high, (chunk + 1) * width)
                where = [slice(0, end - begin) for begin, end in bounds]
                where[axis] = slice(a - low, b - low)
                inner = slice(a - chunk * width, b - chunk * width)
                if direct:
                    self._read_into(fd, weight, chunk, inner, out[where[0]])
                    yield tuple(where), None
                else:
                    yield tuple(where), self._piece(fd, weight, chunk, inner, bounds)

    def _read_into(self, fd: int, weight: Weight, chunk: int, inner: slice, target) -> None:
        """Rows ``inner`` of a chunk, to where they are needed."""
        layout = weight.layout
        whole = inner == slice(0, layout.width)
        if whole or self.verify != "full":
            at = chunk * layout.chunk_bytes + inner.start * layout.row_bytes
            self._read(fd, weight, at, target)
        if self.verify == "full" and whole:
            self._compare(weight, chunk, target)
        elif self.verify == "full":
            target[...] = self._chunk(fd, weight, chunk)[inner]

    def _piece(self, fd: int, weight: Weight, chunk: int, inner: slice, bounds: Bounds):
        """``inner`` of one chunk's cut axis, and ``bounds`` of the other."""
        layout = weight.layout
        index = [slice(begin, end) for begin, end in bounds]
        index[layout.axis] = inner
        if self.verify == "full":
            return self._chunk(fd, weight, chunk)[tuple(index)]
        # Whole rows of the chunk, which lie together.
        first, last = index[0].start, index[0].stop
        shape = (last - first, *layout.chunk_shape[1:])
        part = np.empty(shape, NUMPY[layout.dtype])
        row = part[0].nbytes
        self._read(fd, weight, chunk * layout.chunk_bytes + first * row, part)
        return part[(slice(None), *index[1:])]

    def _chunk(self, fd: int, weight: Weight, chunk: int) -> np.ndarray:
        """A whole chunk, compared with its digest."""
        layout = weight.layout
        data = np.empty(layout.chunk_shape, NUMPY[layout.dtype])
        self._read(fd, weight, chunk * layout.chunk_bytes, data)
        self._compare(weight, chunk, data)
        return data

    def _compare(self, weight: Weight, chunk: int, data: np.ndarray) -> None:
        if xxhash.xxh3_64_hexdigest(as_bytes(data).data) != weight.chunk_digest(chunk):
            raise CheckpointError(self.damaged(weight, chunk))

    def damaged(self, weight: Weight, chunk: int) -> str:
        """What to say of a chunk that does not match its digest."""
        at = chunk * weight.layout.chunk_bytes
        return (
            f"{self.folder / weight.file}: {weight.path} is damaged, in bytes {at} to"
            f" {at + weight.layout.chunk_bytes} of the file; {DAMAGED}"
        )

    def _read(self, fd: int, weight: Weight, offset: int, target: np.ndarray) -> None:
        read_exactly(fd, offset, as_bytes(target), self.folder / weight.file)
        with self._lock:
            self.bytes_read += target.nbytes

    def _opened(self, weight: Weight) -> contextlib.AbstractContextManager[int]:
        """One file at a time: a large model has more weights than a process may open files."""
        return opened(self.folder / weight.file, f" ({weight.path}); {DAMAGED}")


def as_bytes(x: np.ndarray) -> np.ndarray:
    """The bytes of a contiguous array, without a copy."""
    return x.reshape(-1).view(np.uint8)
