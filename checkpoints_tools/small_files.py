"""The small files of a checkpoint, which go along: config, tokenizer, templates, licence."""

import json
from pathlib import Path

from tpjax.errors import CheckpointError

_KEPT = {".json", ".jinja", ".model", ".txt", ".md", ".tiktoken"}
_KEPT_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_LARGEST_KEPT = 1 << 28


def read_small(path: Path) -> bytes:
    """A file beside the weights."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; download it again") from error


def keep(path: Path) -> bool:
    """Whether a file of the source goes along: config, tokenizer, templates, licence; no weights,
    no index, no code."""
    named = path.suffix in _KEPT or path.name.startswith(_KEPT_NAMES)
    if not named or path.name.endswith(".index.json") or path.name.startswith("."):
        return False
    return path.is_file() and path.stat().st_size <= _LARGEST_KEPT


def with_dtype(config: bytes, dtype: str) -> bytes:
    """config.json, saying what the weights have been cast to."""
    about = json.loads(config)
    about.pop("torch_dtype", None)
    about["dtype"] = dtype
    return json.dumps(about, indent=2).encode() + b"\n"
