"""Which files of a folder hold its weights. No jax."""

from pathlib import Path


def weight_files(folder: Path) -> list[Path]:
    """A Hugging Face folder's files, or those of a tpjax checkpoint."""
    found = sorted(folder.glob("*.safetensors"))
    return found or sorted(f for f in (folder / "weights").rglob("*") if f.is_file())


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))
