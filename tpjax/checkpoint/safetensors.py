"""Hugging Face safetensors folders: what is in them, and reading any slice of any tensor.

The safetensors library does the reading; this file finds the shards, checks everything that can be
checked without reading a weight, and turns what is wrong into one line each.
"""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from tpjax.errors import CheckpointError, listing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
READABLE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, known from its header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFolder:
    """The tensors of a folder, single file or sharded with an index. Files are mapped, not loaded.

    Raises CheckpointError for a missing, truncated or corrupt file, header or index.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[Path, object] = {}
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
            raise CheckpointError(
                f"{folder}: neither {SINGLE} nor {INDEX}{also}; save the model as safetensors"
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
            handle = safe_open(path, framework="numpy")
            for name in handle.keys():
                view = handle.get_slice(name)
                self.tensors[name] = TensorInfo(path, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            reason = one_line(error).removeprefix("Error while deserializing header: ")
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({reason}); download it again"
            ) from error
        self._open[path] = handle

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A contiguous copy of one slice, in the stored dtype, one of `READABLE`."""
        info = self.tensors[name]
        try:
            part = self._open[info.file].get_slice(name)[index]  # type: ignore[attr-defined]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: cannot read {name} ({one_line(error)})") from error
        with self._lock:
            self.bytes_read += part.nbytes
        return part


def read_json(path: Path) -> dict:
    """A JSON object from a file, or CheckpointError with the line that is wrong."""
    try:
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
