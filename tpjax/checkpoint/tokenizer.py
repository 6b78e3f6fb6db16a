"""A folder's own tokenizer, by transformers: in half a second, or in two if it is new here.

Importing transformers takes most of that, and for plain text nothing of it is used but the backend
of the tokenizer, which the tokenizers library reads by itself. So that is kept between starts.
"""

import importlib.metadata
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import Tokenizer as Backend

from tpjax import env, kept
from tpjax.checkpoint.folder import ModelFolder
from tpjax.checkpoint.safetensors import one_line, read_json
from tpjax.errors import CheckpointError

# What a backend alone must encode as transformers does, to be taken for it.
_SAMPLES = (
    "Once upon a time",
    " two  spaces,\n\ttabs\r\n and 1234567 numbers. ",
    "naïve façade — 東京 🙂 \u200b\x00",
    "[INST] <s> </s> <pad> <unk> <|endoftext|> <|im_start|>user",
)

_LARGEST = 1 << 28  # bytes of a file that is read to know it again


class KeptTokenizer:
    """transformers' tokenizer of a folder, which is loaded once something else is asked of it than
    to encode plain text, or for `backend_tokenizer`."""

    def __init__(self, backend: Backend, path: Path):
        self.backend_tokenizer, self._path = backend, path

    @cached_property
    def whole(self) -> Any:
        """The tokenizer as transformers has it."""
        return _whole(self._path)

    def encode(self, text: str, **more: Any) -> list[int]:
        """Token ids, special ones added as the model wants them; ``more`` is transformers' own."""
        return self.whole.encode(text, **more) if more else self.backend_tokenizer.encode(text).ids

    def __call__(self, *args: Any, **more: Any) -> Any:
        return self.whole(*args, **more)

    def __len__(self) -> int:
        return len(self.whole)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole, name)


def load_tokenizer(folder: ModelFolder) -> Any:
    """The folder's tokenizer, whose ids must fit the embedding; None where there is none: token ids
    in, token ids out."""
    about = folder.path / "tokenizer_config.json"
    if about.is_file() and "auto_map" in read_json(about):
        raise CheckpointError(
            f"{about}: auto_map asks to run code from the checkpoint (trust_remote_code), which"
            " tpjax never does; use a checkpoint with a tokenizer.json"
        )
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder.path / name).is_file() for name in names):
        return None
    kept_in = env.kept_dir()
    files = None if kept_in is None else _digests(folder.path)
    if files is None:
        kept_in = None
    found = kept.read(kept_in, "tokenizer", files)
    if found is not None:
        about, _, backend = found.partition(b"\n")
        highest = json.loads(about)["highest"]
        tokenizer = KeptTokenizer(Backend.from_str(backend.decode()), folder.path)
    else:
        tokenizer = _whole(folder.path)
        highest = max(tokenizer.get_vocab().values(), default=-1)
        if kept_in is not None and (backend := _enough(tokenizer)) is not None:
            first = json.dumps({"highest": highest})
            kept.write(kept_in, "tokenizer", files, f"{first}\n{backend}".encode())
    if highest >= folder.config.vocab:
        raise CheckpointError(
            f"{folder.path}: the tokenizer has id {highest}, but the embedding only"
            f" vocab={folder.config.vocab} rows; they do not belong together"
        )
    return tokenizer


def _whole(path: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise CheckpointError(
            f"{path}: the tokenizer cannot be loaded ({one_line(error)}); download its files again"
        ) from error


def _enough(tokenizer: Any) -> str | None:
    """The backend as text, if it does by itself what the tokenizer does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        return None
    again = Backend.from_str(backend.to_str())
    again.no_truncation()  # some files say so, and transformers heeds it only where it is asked to
    again.no_padding()
    special = "".join(str(token) for token in tokenizer.all_special_tokens)
    samples = (*_SAMPLES, f"a{special} b", " ".join(_SAMPLES) * 500)
    same = all(again.encode(sample).ids == tokenizer.encode(sample) for sample in samples)
    return again.to_str() if same else None


def _digests(path: Path) -> tuple[Any, ...] | None:
    """Everything a tokenizer may be made of: small files, by their content, and the libraries. None
    where that cannot be told."""
    kinds = (".json", ".model", ".txt", ".jinja", ".tiktoken")
    try:
        files = sorted(f for f in path.iterdir() if f.suffix in kinds and f.is_file())
        if any(file.stat().st_size > _LARGEST for file in files):
            return None
        content = [(file.name, xxhash.xxh3_128_hexdigest(file.read_bytes())) for file in files]
    except OSError:
        return None
    return (*content, *(importlib.metadata.version(n) for n in ("transformers", "tokenizers")))
