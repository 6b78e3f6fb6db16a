"""Which model a word means: published ones by name, from the table in models.json; folders,
config.json files and hub ids by what their config says.

The table holds facts, so that planning a published model reads nothing and imports little. It is
made from their config.json files (`tests/test_inventory.py` says how) and held equal to them.
"""

import difflib
import json
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tpjax.config import ModelConfig
from tpjax.errors import CheckpointError, UsageError
from tpjax.facts import from_facts

TABLE = Path(__file__).with_name("models.json")


@dataclass(frozen=True)
class Model:
    """``name`` as the user knows it; ``hub``: its id there, of published ones."""

    name: str
    config: ModelConfig
    hub: str | None = None


@cache
def table() -> dict[str, dict]:
    """Name -> ``hub`` and ``facts``, those of ModelConfig's fields that are not its defaults."""
    return json.loads(TABLE.read_text())


def known(name: str) -> Model | None:
    """A published model by its name or its id on the hub, in any case; None if it is not one.
    ``llama-3.1-70b`` is found where only ``llama-3.1-70b-instruct`` is listed: they have one form;
    and ``mixtral-8x22b`` where only one version of it is.
    """
    word = name.lower()
    called = [key for key, entry in table().items() if word in (key, entry["hub"].lower())]
    called = called or [key for key in table() if word == key.removesuffix("-instruct")]
    called = called or [key for key in table() if word == _plain(key)]
    if len(called) != 1:
        return None
    entry = table()[called[0]]
    return Model(called[0], from_facts(entry["facts"]), entry["hub"])


def _plain(key: str) -> str:
    """``mixtral-8x22b`` of ``mixtral-8x22b-v0.1``: without version and kind of training."""
    return re.sub(r"(-(instruct|it|hf|v\d+(\.\d+)?))+$", "", key).removeprefix("meta-")


def find(name: str, dtype: str | None = None) -> Model:
    """The model a word means, computing in ``dtype`` or in its checkpoint's. Raises CheckpointError
    or UsageError, with the nearest names."""
    if os.path.exists(os.path.expanduser(name)) and name:
        return _read(Path(os.path.expanduser(name)), name, dtype)
    if model := known(name):
        return replace(model, config=replace(model.config, dtype=dtype or model.config.dtype))
    if "/" in name and not name.startswith((".", "/", "~")) and name.count("/") == 1:
        from tpjax.checkpoint.folder import locate

        return _read(locate(name, weights=None), name, dtype)
    names = [key.removesuffix("-instruct") for key in table()]
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    raise UsageError(
        f"model {name!r}: no such folder or file, no hub id of the form org/name, and not in the"
        f" table of published models; nearest: {', '.join(near or names)}"
    )


def _read(path: Path, name: str, dtype: str | None) -> Model:
    from tpjax.checkpoint.folder import config_only, read_folder, with_dtype

    folder = read_folder(path) if path.is_dir() else config_only(path)
    dtype = dtype or folder.stored_dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"{path}: dtype {dtype!r} is not known here; give --dtype")
    return Model(name, with_dtype(folder.config, dtype))


def shortened(config: ModelConfig, layers: int) -> ModelConfig:
    """The first ``layers`` neighbours among which is every kind of layer that the model has."""
    kinds = [(config.is_local(n), config.is_sparse(n)) for n in range(config.layers)]
    for first in range(config.layers - layers + 1):
        if set(kinds[first : first + layers]) == set(kinds):
            break
    else:
        raise UsageError(
            f"--layers {layers}: no {layers} of {config.layers} layers are of all kinds"
        )
    part = slice(first, first + layers)
    moe = config.moe and replace(config.moe, layers=config.moe.layers[part])
    return replace(config, layers=layers, local_layers=config.local_layers[part], moe=moe)
