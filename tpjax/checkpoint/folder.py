"""A model folder: where it is, what it declares, and its tokenizer. No weights are read here."""

import importlib.resources
from dataclasses import dataclass, replace
from pathlib import Path

from tpjax.checkpoint.safetensors import read_json
from tpjax.config import DTYPES, ModelConfig
from tpjax.errors import CheckpointError, UsageError
from tpjax.models import Family, find

BUNDLED = "shakespeare-4m"
_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


@dataclass(frozen=True)
class ModelFolder:
    """A local folder and what its JSON files say."""

    path: Path
    config: ModelConfig
    family: Family
    stored_dtype: str
    generation: dict  # generation_config.json over config.json's own ids


def bundled() -> Path:
    """The small model that ships with tpjax."""
    return Path(str(importlib.resources.files("tpjax") / "bundled" / BUNDLED))


def locate(model: str | Path) -> Path:
    """A local folder for a path or a hub id (``org/name``, downloaded once; HF_HOME and HF_TOKEN
    are honoured). Raises CheckpointError saying which of the two failed."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model}: a file; give the folder that holds config.json")
    name = str(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: no such folder, and not a hub id of the form org/name")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_WANTED))
    except Exception as error:  # whatever the hub client raises, the user needs one line
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{model}: no such folder, and the hub says: {first}") from error


def read_folder(path: Path) -> ModelFolder:
    """Config and generation config of a local folder, checked."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no config.json; give a Hugging Face model folder")
    raw = read_json(file)
    config, family = model_config(raw, str(file))
    generation = {k: raw[k] for k in ("bos_token_id", "eos_token_id") if raw.get(k) is not None}
    extra = path / "generation_config.json"
    if extra.is_file():
        generation |= {k: v for k, v in read_json(extra).items() if v is not None}
    return ModelFolder(path, config, family, stored_dtype(raw), generation)


def config_only(file: Path) -> ModelFolder:
    """A lone ``config.json``, for planning and for measuring with random weights."""
    raw = read_json(file)
    config, family = model_config(raw, str(file))
    return ModelFolder(file.parent, config, family, stored_dtype(raw), {})


def stored_dtype(raw: dict) -> str:
    """The dtype a config names, in the new word or the old one."""
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")


def model_config(raw: dict, where: str) -> tuple[ModelConfig, Family]:
    """The facts in a ``config.json``, with transformers filling in what it leaves out."""
    if "auto_map" in raw:
        raise CheckpointError(
            f"{where}: auto_map asks to run code from the checkpoint (trust_remote_code), which"
            " tpjax never does; use a checkpoint whose model_type is built in"
        )
    family = find(raw.get("model_type"), where)
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        hf = transformers.CONFIG_MAPPING[family.model_type].from_dict(raw).to_dict()
        return family.config(hf), family
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except Exception as error:  # a config transformers itself refuses
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{where}: not a valid {family.model_type} config ({first})") from error


def choose_dtype(asked: str, stored: str, platform: str) -> str:
    """``auto`` is the checkpoint's dtype, but float32 on a CPU, where it is both exact and the
    faster of the two (BENCHMARKS.md)."""
    if asked != "auto":
        if asked not in DTYPES:
            raise UsageError(f"dtype={asked!r}: known are auto, {', '.join(DTYPES)}")
        return asked
    if platform == "cpu":
        return "float32"
    return stored if stored in DTYPES else "bfloat16"


def with_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    return replace(config, dtype=dtype)


def eos_ids(generation: dict) -> tuple[int, ...]:
    """Every end-of-sequence id the model declares."""
    eos = generation.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def load_tokenizer(folder: ModelFolder):
    """The folder's own tokenizer, by transformers; its ids must fit the embedding.

    Returns None where there is none: token ids in, token ids out.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder.path / name).is_file() for name in names):
        return None
    if "auto_map" in (read_json(p) if (p := folder.path / "tokenizer_config.json").is_file() else {}):
        raise CheckpointError(f"{p}: auto_map asks to run code from the checkpoint; tpjax never does")
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder.path), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder.path}: the tokenizer cannot be loaded ({first})") from error
    highest = max(tokenizer.get_vocab().values())
    if highest >= folder.config.vocab:
        raise CheckpointError(
            f"{folder.path}: the tokenizer has id {highest}, but the embedding only"
            f" vocab={folder.config.vocab} rows; they do not belong together"
        )
    return tokenizer
