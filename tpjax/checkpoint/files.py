"""Which files of a folder hold its weights, and how much that will be. No jax."""

import json
from pathlib import Path

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
    CheckpointError for an index or a file that is none, OSError for a file that is not there."""
    files = weight_files(folder)
    size = sum(file.stat().st_size for file in files)
    stored = _first_dtype(files[0]) if files and files[0].suffix == ".safetensors" else None
    narrow = dtype not in ("auto", "float32")
    if stored == "F16" and not narrow:
        return 2 * size
    return size // 2 if stored == "F32" and narrow else size


def _first_dtype(file: Path) -> str | None:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        content = opened.read(min(length, _LONGEST_HEADER))
    try:
        header = json.loads(content).items()
        return next((about["dtype"] for name, about in header if name != "__metadata__"), None)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file; download it again") from error
