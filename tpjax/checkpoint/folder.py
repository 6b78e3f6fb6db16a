"""A model folder: where it is and what it declares. No weights are read here."""

import importlib.metadata
import importlib.resources
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tpjax import env, kept
from tpjax.checkpoint.manifest import JOURNAL
from tpjax.checkpoint.safetensors import dtype_of_first, one_line, read_json
from tpjax.config import DTYPES, ModelConfig, check_dtype
from tpjax.errors import CheckpointError, UsageError
from tpjax.facts import facts, from_facts
from tpjax.models import Family, find
from tpjax.rope import Rope

BUNDLED = "shakespeare-4m"
_UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights
_WANTED = ["*.json", "tokenizer.model", "*.jinja"]


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


def locate(model: str | Path, weights: str | None = "*.safetensors") -> Path:
    """A local folder for a path or a hub id (``org/name``, downloaded once, with the weights of
    that pattern if any; HF_HOME and HF_TOKEN are honoured). Raises CheckpointError saying which of
    the two failed."""
    if not isinstance(model, str | os.PathLike):
        raise UsageError(f"model={model!r}: give a folder or a hub id of the form org/name")
    name = os.fspath(model)
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path) and name:
        return path
    if os.path.exists(path) and name:
        raise CheckpointError(f"{model}: a file; give the folder that holds config.json")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        shown = f"{name[:100]!r}" + ("..." if len(name) > 100 else "")
        raise CheckpointError(f"{shown}: no such folder, and not a hub id of the form org/name")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                allow_patterns=[*_WANTED, *([weights] if weights else [])],
                ignore_patterns=_UNWANTED,
            )
        )
    except Exception as error:  # whatever the hub client raises, the user needs one line
        raise CheckpointError(
            f"{model}: no such folder, and the hub says: {one_line(error)};"
            " check the name, the network and HF_TOKEN"
        ) from error


def refuse_unfinished(path: Path) -> None:
    """Raise CheckpointError for what a conversion has left in the middle of its work."""
    if (path / JOURNAL).exists():
        raise CheckpointError(
            f"{path}: an unfinished conversion; tpjax-checkpoint convert --resume completes it"
        )


def read_folder(path: Path) -> ModelFolder:
    """Config and generation config of a local folder, checked."""
    refuse_unfinished(path)
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no config.json; give a Hugging Face model folder")
    raw = read_json(file)
    config, family = model_config(raw, str(file))
    generation = {k: raw[k] for k in ("bos_token_id", "eos_token_id") if raw.get(k) is not None}
    extra = path / "generation_config.json"
    if extra.is_file():
        generation |= {k: v for k, v in read_json(extra).items() if v is not None}
    return ModelFolder(path, config, family, stored_dtype(raw, path), generation)


def config_only(file: Path) -> ModelFolder:
    """A lone ``config.json``, for planning and for measuring with random weights."""
    raw = read_json(file)
    config, family = model_config(raw, str(file))
    return ModelFolder(file.parent, config, family, stored_dtype(raw), {})


def stored_dtype(raw: dict, folder: Path | None = None) -> str:
    """The dtype a config names, in the new word or the old one; else what its weights have."""
    named = raw.get("dtype") or raw.get("torch_dtype")
    if named is None and folder is not None:
        named = dtype_of_first(folder)
    return str(named or "float32").removeprefix("torch.")


def model_config(raw: dict, where: str) -> tuple[ModelConfig, Family]:
    """The facts in a ``config.json``, with transformers filling in what it leaves out."""
    if isinstance(about := raw.get("quantization_config"), dict):
        raise CheckpointError(
            f"{where}: weights quantised by {about.get('quant_method', 'an unnamed method')}"
            " (quantization_config); give the checkpoint it was made from"
        )
    if raw.get("per_layer_config"):
        raise CheckpointError(f"{where}: per_layer_config: no layer here is made by it")
    if "auto_map" in raw:
        raise CheckpointError(
            f"{where}: auto_map asks to run code from the checkpoint (trust_remote_code), which"
            " tpjax never does; use a checkpoint whose model_type is built in"
        )
    kind = raw.get("model_type")
    family = find(kind if kind is None or isinstance(kind, str) else repr(kind), where)
    # What somebody else registers may change without our source.
    ours = family.config.__module__.startswith("tpjax.")
    kept_in = env.kept_dir() if ours else None
    about = (json.dumps(raw, sort_keys=True), importlib.metadata.version("transformers"))
    if found := kept.read(kept_in, "config", about):
        return from_facts(json.loads(found)), family
    config = _resolved(raw, family, where)
    kept.write(kept_in, "config", about, json.dumps(facts(config)).encode())
    return config, family


def _resolved(raw: dict, family: Family, where: str) -> ModelConfig:
    """What the family makes of a config that transformers has completed."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        known = transformers.CONFIG_MAPPING
        name = family.model_type
        hf = known[name].from_dict(raw).to_dict() if name in known else raw
        config = family.config(hf)
        wrong = impossible(config)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except Exception as error:  # a config transformers itself refuses
        raise CheckpointError(
            f"{where}: not a valid {family.model_type} config ({one_line(error)})"
        ) from error
    if wrong:
        raise CheckpointError(f"{where}: not a valid {family.model_type} config ({wrong})")
    return config


def impossible(config: ModelConfig) -> str | None:
    """What no model can have, though transformers lets it pass; None if nothing."""
    sizes = ("vocab", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "max_position")
    for word in sizes:
        if getattr(config, word) < 1:
            return f"{word}={getattr(config, word)}: must be 1 or more"
    if config.moe is not None:
        moe = config.moe
        for word in ("experts", "per_token", "mlp"):
            if getattr(moe, word) < 1:
                return f"{word}={getattr(moe, word)}: must be 1 or more"
        if moe.per_token > moe.experts:
            return f"{moe.per_token} experts per token, but there are only {moe.experts}"
    if config.window is not None and config.window < 1:
        return f"sliding_window={config.window}: must be 1 or more"
    if config.heads % config.kv_heads:
        return f"heads={config.heads} is not a multiple of kv_heads={config.kv_heads}"
    ropes = filter(None, (config.rope, config.rope_local))
    return next(filter(None, (_impossible_rope(rope, config.head_dim) for rope in ropes)), None)


def _impossible_rope(rope: Rope, head_dim: int) -> str | None:
    dim = rope.dim(head_dim)
    if dim < 2 or dim % 2:
        part = "" if rope.rotated == 1 else f" x partial_rotary_factor={rope.rotated} = {dim}"
        return f"head_dim={head_dim}{part}: must be even"
    for word in ("theta", "factor", "original_max_position", "beta_fast", "beta_slow"):
        if not getattr(rope, word) > 0:
            return f"rope {word}={getattr(rope, word)}: must be above 0"
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        return "rope low_freq_factor must be below high_freq_factor"
    if rope.kind == "longrope" and not len(rope.short_factor) == len(rope.long_factor) == dim // 2:
        return f"rope short_factor and long_factor must have {dim // 2} numbers each"
    if not all(factor > 0 for factor in rope.short_factor + rope.long_factor):
        return "rope short_factor and long_factor must be above 0"
    if not all(np.isfinite(rope.inv_freq(head_dim, long=long)).all() for long in (False, True)):
        return "rope: its frequencies are not finite"
    return None


def choose_dtype(asked: str, stored: str, platform: str) -> str:
    """``auto`` is the checkpoint's dtype, but float32 on a CPU, where it is exact and, for
    a checkpoint of bfloat16, decodes as fast (BENCHMARKS.md)."""
    check_dtype(asked)
    if asked != "auto":
        return asked
    if platform == "cpu":
        return "float32"
    return stored if stored in DTYPES else "bfloat16"


def with_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    return replace(config, dtype=dtype)


def eos_ids(generation: dict) -> tuple[int, ...]:
    """Every end-of-sequence id the model declares; raises CheckpointError for what is no id."""
    eos = generation.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for id_ in ids:
        if not isinstance(id_, int) or not -1 <= id_ < 2**31:
            raise CheckpointError(f"eos_token_id={eos!r} in the generation config: not a token id")
    return tuple(id_ for id_ in ids if id_ >= 0)  # some say -1 for none
