"""Where tensors come from, as rows: safetensors, legacy torch files, tpjax checkpoints.

Every source has ``folder``, ``tensors`` (name -> TensorInfo), ``files`` (what its tensors lie in)
and ``rows(name)``: a context in which any run of rows can be read into a buffer of bytes.
"""

import contextlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from tpjax import env
from tpjax.checkpoint.manifest import Weight
from tpjax.checkpoint.safetensors import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    TensorInfo,
    one_line,
    opened,
    read_exactly,
    read_json,
)
from tpjax.checkpoint.tensors import Tensor
from tpjax.errors import CheckpointError, UsageError, listing

TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_LARGEST_UNMAPPED = 1 << 30  # bytes; what is not mapped is in memory until the end
_TORCH_WORDS = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}

# read(first, rows): fill ``rows``, uint8 [n, row_bytes], with rows first to first + n.
ReadRows = Callable[[int, np.ndarray], None]


class RowSource(Protocol):
    folder: Path
    tensors: dict[str, TensorInfo]

    @property
    def files(self) -> list[Path]: ...

    def key(self, tensor: Tensor) -> str: ...

    def rows(self, name: str) -> contextlib.AbstractContextManager[ReadRows]: ...


def hugging_face(folder: Path) -> RowSource:
    """The tensors of a Hugging Face folder: safetensors if there are any, else legacy files."""
    if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        return SafetensorsRows(folder)
    if (folder / TORCH_INDEX).is_file() or (folder / TORCH_SINGLE).is_file():
        return TorchRows(folder)
    return SafetensorsRows(folder)  # which says what is missing


class Headers:
    """Tensors that are known, but not here."""

    finite = False

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo]):
        self.folder, self.tensors = folder, tensors

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    def key(self, tensor: Tensor) -> str:
        return tensor.name

    def rows(self, name: str) -> contextlib.AbstractContextManager[ReadRows]:
        raise UsageError(f"{self.folder}: there are no weights here; this can only be planned")


def hub_headers(name: str, folder: Path) -> Headers:
    """The tensors of a hub id, from the headers of its safetensors files."""
    import huggingface_hub

    try:
        about = huggingface_hub.get_safetensors_metadata(name)
    except Exception as error:  # whatever the hub client raises, the user needs one line
        raise CheckpointError(
            f"{name}: the hub gives no safetensors headers ({one_line(error)}); check the network"
            " and HF_TOKEN, or download the folder and give that"
        ) from error
    return Headers(
        folder,
        {
            tensor: TensorInfo(folder / file, tuple(info.shape), info.dtype)
            for file, of in about.files_metadata.items()
            for tensor, info in of.tensors.items()
        },
    )


class SafetensorsRows(SafetensorsFolder):
    """Rows by their offset in the file: no mapped page whose loss would end the process."""

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    @contextlib.contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        info = self.tensors[name]
        with opened(info.file) as fd:

            def read(first: int, rows: np.ndarray) -> None:
                at = info.offset + first * rows.shape[1]
                read_exactly(fd, at, rows.reshape(-1), info.file)

            yield read


class TorchRows:
    """Legacy ``pytorch_model*.bin`` files: torch reads them, with ``weights_only=True``, which
    refuses every pickle that would run code; their data stays mapped, never loaded whole. (A file
    that is cut while it is mapped ends the process: the kernel's way of saying so.)"""

    finite = False

    def __init__(self, folder: Path):
        self.folder = folder
        self._states: dict[Path, dict] = {}
        self.tensors: dict[str, TensorInfo] = {}
        index = folder / TORCH_INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index}: no weight_map in the index; download it again")
            names = sorted({str(file) for file in weight_map.values()})
        else:
            weight_map, names = None, [TORCH_SINGLE]
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise CheckpointError(
                    f"{index}: entry {name!r} points outside the folder; every shard must be in it"
                )
            if not os.path.isfile(folder / name):
                raise CheckpointError(f"{index}: names {name!r}, which is not there; download it")
            self._read(folder / name)
        if weight_map is not None:
            wrong = [n for n, f in weight_map.items() if self._file(n) != folder / str(f)]
            if wrong:
                raise CheckpointError(
                    f"{index}: {len(wrong)} tensor(s) are not in the file the index names:"
                    f" {listing(wrong)}; download the index and its files again, together"
                )

    def _file(self, name: str) -> Path | None:
        return self.tensors[name].file if name in self.tensors else None

    def _read(self, path: Path) -> None:
        torch, size = _torch(path), path.stat().st_size
        mapped = zipfile.is_zipfile(path)
        if not mapped and size > _LARGEST_UNMAPPED:
            raise CheckpointError(
                f"{path}: {size / 1e9:.1f} GB in the form torch had before 1.6, which can only be"
                " loaded whole; load it with torch and save it again"
            )
        try:
            with warnings.catch_warnings(action="ignore"):
                state = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path}: refused, it would run code when read, or it is damaged"
                f" ({one_line(error, 120)}); use a checkpoint in safetensors"
            ) from error
        except Exception as error:
            raise CheckpointError(
                f"{path}: torch cannot read it ({one_line(error, 120)}); download it again"
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{path}: holds a {type(state).__name__}, not named tensors")
        self._states[path] = state
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise CheckpointError(f"{path}: {name!r} is a {type(tensor).__name__}, no tensor")
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise CheckpointError(
                    f"{path}: {name} is {tensor.layout} on {tensor.device}, not values one after"
                    " the other; load it with torch and save it again"
                )
            if name in self.tensors:
                raise CheckpointError(
                    f"{path}: holds {name}, and so does {self.tensors[name].file.name};"
                    " download the folder again"
                )
            word = _TORCH_WORDS.get(str(tensor.dtype), str(tensor.dtype))
            self.tensors[name] = TensorInfo(path, tuple(tensor.shape), word)

    @property
    def files(self) -> list[Path]:
        return sorted(self._states)

    def key(self, tensor: Tensor) -> str:
        return tensor.name

    @contextlib.contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        tensor = self._states[self.tensors[name].file][name]
        torch = _torch(self.tensors[name].file)

        def read(first: int, rows: np.ndarray) -> None:
            part = tensor[first : first + len(rows)].contiguous()
            rows[...] = part.view(torch.uint8).numpy().reshape(rows.shape)

        yield read


def _torch(path: Path):
    env.let_torch_in()
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"{path}: legacy files are read by torch, which is not installed: pip install"
            ' "tpjax[convert]", or use a checkpoint in safetensors'
        ) from error
    return torch


@contextlib.contextmanager
def stored_rows(folder: Path, weight: Weight, scratch: np.ndarray) -> Iterator[ReadRows]:
    """Rows of one stored weight, put together from its chunks in ``scratch`` (bytes, at least
    `Layout.cut_bytes` of the rows, unless the rows lie together)."""
    layout, path = weight.layout, folder / weight.file
    with opened(path) as fd:

        def read(first: int, rows: np.ndarray) -> None:
            if layout.axis == 0:
                read_exactly(fd, first * layout.row_bytes, rows.reshape(-1), path)
                return
            at = 0
            for _, offset, size in layout.runs(first, len(rows)):
                read_exactly(fd, offset, scratch[at : at + size], path)
                at += size
            layout.join(scratch, rows)

        yield read


def blank_padding(folder: Path, weight: Weight) -> bool:
    """Whether what fills up the last chunk is zero, as no row of the weight tells."""
    layout, path = weight.layout, folder / weight.file
    last = (layout.chunks - 1) * layout.chunk_bytes
    with opened(path) as fd:
        if layout.axis == 0:
            rest = np.empty(layout.data_bytes - layout.nbytes, np.uint8)
            read_exactly(fd, layout.nbytes, rest, path)
            return not rest.any()
        used = layout.shape[1] - (layout.chunks - 1) * layout.width
        if used == layout.width:
            return True
        strip = np.empty((layout.rows, layout.width * layout.itemsize), np.uint8)
        read_exactly(fd, last, strip.reshape(-1), path)
        return not strip[:, used * layout.itemsize :].any()
