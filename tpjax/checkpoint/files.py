"""Which files of a folder hold its weights, and how much that will be. No jax."""

import json
from pathlib import Path
from typing import BinaryIO

from tpjax.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST_HEADER = 100_000_000  # bytes; the library takes no longer ones either


def weight_files(folder: Path) -> list[Path]:
    """A Hugging Face folder's files, or those of a tpjax checkpoint. Raises CheckpointError for an
    index that is none."""
    if (index := folder / INDEX).is_file():
        try:
            names = json.loads(index.read_text())["weight_map"].values()
            return sorted({folder / name for name in names})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: no index of weights; download it again") from error
    if (single := folder / SINGLE).is_file():
        return [single]
    return sorted(file for file in (folder / "weights").rglob("*") if file.is_file())


def held_bytes(folder: Path, dtype: str) -> int:
    """Bytes that CPU devices will hold of a folder's weights, by its first file: what is stored,
    but for float16, which nothing multiplies there, and float32 that is to be narrow. Raises
    CheckpointError for an index or a file that is none."""
    files = [file for file in weight_files(folder) if file.is_file()]  # a pipe might never open
    size = sum(file.stat().st_size for file in files)
    stored = _first_dtype(files[0]) if files and files[0].suffix == ".safetensors" else None
    narrow = dtype not in ("auto", "float32")
    if stored == "F16" and not narrow:
        return 2 * size
    return size // 2 if stored == "F32" and narrow else size


def _first_dtype(file: Path) -> str | None:
    try:
        with open(file, "rb") as opened:
            header, _ = read_header(opened)
        return next((about["dtype"] for about in header.values()), None)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file; download it again") from error


def read_header(file: BinaryIO) -> tuple[dict, int]:
    """What a safetensors file says of each tensor, and where its data begin. The file is taken to
    be good: anything may be raised, or returned, if it is not."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(min(length, _LONGEST_HEADER)))
    header.pop("__metadata__", None)
    return header, 8 + length
