"""Hugging Face safetensors folders: what is in them, and reading any slice of any tensor.

The safetensors library judges every header; this file finds the shards, checks everything that can
be checked without reading a weight, turns what is wrong into one line each, and moves a byte once,
to where it belongs: by a read where a slice is a run of bytes, else from the file's own pages.
"""

import contextlib
import errno
import json
import math
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes  # noqa: F401  (numpy knows bfloat16 by it)
import numpy as np
from safetensors import SafetensorError, safe_open

from tpjax.checkpoint.files import INDEX, SINGLE, read_header
from tpjax.checkpoint.tensors import Tensor
from tpjax.errors import CheckpointError, listing

READABLE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WORDS = {ours: theirs for theirs, ours in READABLE.items()}
CHUNK = 1 << 21  # elements read together: at most 8 MB, and as much again for a cast
_LARGEST_JSON = 1 << 28  # bytes; the index of the largest models has a few million


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, known from its header. ``offset``: where its bytes begin in the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0


class SafetensorsFolder:
    """The tensors of a folder, single file or sharded with an index. Files are open, not loaded.

    Raises CheckpointError for a missing, truncated or corrupt file, header or index.
    """

    finite = False  # nobody has looked

    def __init__(self, folder: Path):
        self.folder = folder
        self._maps: dict[Path, mmap.mmap] = {}
        self._files: dict[Path, int] = {}  # descriptors
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.tensors: dict[str, TensorInfo] = {}
        index = folder / INDEX
        if index.is_file():
            self._read_index(index)
        elif (folder / SINGLE).is_file():
            self._read_header(folder / SINGLE)
        else:
            names = ("*.safetensors", "*.bin", "*.pth", "*.gguf")
            found = sorted(p.name for name in names for p in folder.glob(name))
            also = f"; found {listing(found, 3)}" if found else ""
            legacy = any(name.endswith(".bin") for name in found)
            fix = "; tpjax-checkpoint convert reads those" if legacy else ""
            raise CheckpointError(
                f"{folder}: neither {SINGLE} nor {INDEX}{also}; save the model as safetensors{fix}"
            )

    def _read_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: no weight_map in the index; download it again")
        weight_map = {name: str(file) for name, file in weight_map.items()}
        for file in sorted(set(weight_map.values())):
            path = self.folder / file
            # A link to elsewhere is how hub caches store files; a name that leads out is not.
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise CheckpointError(
                    f"{index}: entry {file!r} points outside the folder; every shard must be in it"
                )
            if not os.path.isfile(path):  # False, where Path.is_file raises, for an absurd name
                raise CheckpointError(f"{index}: names {file!r}, which is not there; download it")
            self._read_header(path)
        wrong = [n for n, file in weight_map.items() if self._misplaced(n, self.folder / file)]
        if wrong:
            raise CheckpointError(
                f"{index}: {len(wrong)} tensor(s) are not in the file the index names:"
                f" {listing(wrong)}; download the index and its files again, together"
            )

    def _misplaced(self, name: str, path: Path) -> bool:
        return name not in self.tensors or self.tensors[name].file != path

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="numpy") as handle, open(path, "rb") as file:
                offsets = _offsets(file)
                for name in handle.keys():
                    view = handle.get_slice(name)
                    if name in self.tensors:
                        raise CheckpointError(
                            f"{path}: holds {name}, and so does {self.tensors[name].file.name};"
                            " download the folder again"
                        )
                    shape = tuple(view.get_shape())
                    self.tensors[name] = TensorInfo(path, shape, view.get_dtype(), offsets[name])
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._files[path] = os.dup(file.fileno())  # of the file that was judged
                weakref.finalize(self, os.close, self._files[path])
        except CheckpointError:
            raise
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            reason = one_line(error).removeprefix("Error while deserializing header: ")
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({reason}); download it again"
            ) from error

    def key(self, tensor: Tensor) -> str:
        """What a tensor is called here."""
        return tensor.name

    def check_unchanged(self) -> None:
        """Files stay open, so what was opened is what is read."""

    def grain(self, name: str) -> tuple[int, int]:
        """Along which axis, and at multiples of what, to divide a slice between threads."""
        return 0, 1

    def parts(
        self, name: str, bounds: tuple[tuple[int, int], ...], out: np.ndarray
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray | None]]:
        """A slice of one tensor, a few rows at a time: (where in the slice, values as stored).
        Whole rows in their stored dtype are read straight into ``out``, and the values are None:
        that takes two thirds of the time (BENCHMARKS.md). Others are the file's own pages, let go
        when the next ones are asked for: they would count as this process's memory."""
        (first, last), *others = bounds
        inner = tuple(slice(a, b) for a, b in others)
        within = tuple(slice(0, b - a) for a, b in others)
        step = max(1, CHUNK // max(1, math.prod(b - a for a, b in others)))
        whole = self._stored(name)
        rows = others == [(0, n) for n in whole.shape[1:]]
        straight = rows and out.dtype == whole.dtype and out.flags.c_contiguous
        for row in range(first, last, step):
            end = min(row + step, last)
            where = (slice(row - first, end - first), *within)
            part = whole[(slice(row, end), *inner)]
            if straight:
                self._read(name, row, out[where])
                yield where, None
            else:
                yield where, part
                self._let_go(name, row, end)
            with self._lock:
                self.bytes_read += part.nbytes

    def _read(self, name: str, row: int, target: np.ndarray) -> None:
        """Fill ``target`` with whole rows from this one on."""
        info = self.tensors[name]
        start = info.offset + row * target[:1].nbytes
        to = target.reshape(-1).view(np.uint8)
        read_exactly(self._files[info.file], start, to, info.file)

    def _stored(self, name: str) -> np.ndarray:
        """One tensor as it is in the file, in its stored dtype, one of `READABLE`."""
        info = self.tensors[name]
        dtype = np.dtype(READABLE[info.dtype])
        size = math.prod(info.shape)
        flat = np.frombuffer(self._maps[info.file], dtype, size, info.offset)
        return flat.reshape(info.shape)

    def _let_go(self, name: str, row: int, end: int) -> None:
        info = self.tensors[name]
        each = math.prod(info.shape[1:]) * np.dtype(READABLE[info.dtype]).itemsize
        start = (info.offset + row * each) // mmap.PAGESIZE * mmap.PAGESIZE
        with contextlib.suppress(AttributeError):  # only Linux has it
            pages = self._maps[info.file]
            pages.madvise(mmap.MADV_DONTNEED, start, info.offset + end * each - start)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of one slice, in the stored dtype."""
        return np.array(self._stored(name)[index])


def dtype_of_first(folder: Path) -> str | None:
    """The dtype of a folder's first tensor, None if it has none; what is wrong is found later."""
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        with contextlib.suppress(SafetensorError, OSError):
            handle = safe_open(path, framework="numpy")
            return next(
                (READABLE.get(handle.get_slice(n).get_dtype()) for n in handle.keys()), None
            )
    return None


def _offsets(file: BinaryIO) -> dict[str, int]:
    """Where each tensor's bytes begin, from a header that the library has found to be good."""
    header, begin = read_header(file)
    return {name: begin + info["data_offsets"][0] for name, info in header.items()}


@contextlib.contextmanager
def opened(path: Path, more: str = "") -> Iterator[int]:
    """A descriptor to read a file from. Raises CheckpointError, which ends with ``more``, if there
    is none, or a pipe, which might never open."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "Not a file")
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}{more}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def read_exactly(fd: int, offset: int, target: np.ndarray, where: Path) -> None:
    """Fill ``target`` (contiguous bytes) from a file. Raises CheckpointError if the file cannot be
    read or ends before that."""
    done = 0
    while done < len(target):
        try:
            got = os.preadv(fd, [target[done:]], offset + done)  # type: ignore[list-item]
        except OSError as error:
            at = offset + done
            raise CheckpointError(
                f"{where}: cannot be read at byte {at} ({error.strerror}); check the disk, or"
                " download it again"
            ) from error
        if not got:
            raise CheckpointError(
                f"{where}: ends at byte {offset + done}, before its data; it was changed or cut"
                " while it was read"
            )
        done += got


def read_json(path: Path) -> dict:
    """A JSON object from a file, or CheckpointError with the line that is wrong."""
    try:
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise CheckpointError(f"{path}: {size} bytes are no config or index; download it again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not valid JSON ({one_line(error)}); repair it or download it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a JSON object; download it again"
        )
    return content


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an error of another library says, as part of one line."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    line = " ".join(str(said).split()) or type(error).__name__
    return line if len(line) <= limit else f"{line[:limit]} ..."
