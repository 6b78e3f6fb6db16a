"""A config as JSON holds it: what of it is not a default."""

from dataclasses import asdict, fields
from typing import Any

from tpjax.config import ModelConfig, MoE
from tpjax.rope import Rope


def facts(config: ModelConfig) -> dict:
    """What of a config is not a default, as JSON holds it. Layers as runs: [[true, 5], [false, 1]]
    is five and one, and so on until all have one."""
    usual = {f.name: f.default for f in fields(ModelConfig)}
    out = {}
    for name in usual:
        value = getattr(config, name)
        if value == usual[name]:
            continue
        if isinstance(value, Rope | MoE):
            kind = type(value)
            plain = {f.name: f.default for f in fields(kind)}
            value = {k: v for k, v in asdict(value).items() if v != plain[k]}
            if "layers" in value:
                value["layers"] = _runs(value["layers"])
        elif name == "local_layers":
            value = _runs(value)
        out[name] = value
    return out


def from_facts(facts: dict) -> ModelConfig:
    """The inverse of `facts`."""
    out = dict(facts)
    for name in ("rope", "rope_local"):
        if out.get(name) is not None:
            words: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in out[name].items()
            }
            out[name] = Rope(**words)
    if "moe" in out:
        out["moe"] = MoE(**out["moe"] | {"layers": _layers(out["moe"]["layers"])})
    if "local_layers" in out:
        out["local_layers"] = _layers(out["local_layers"])
    return ModelConfig(**out)


def _runs(layers: tuple[bool, ...]) -> list[list]:
    runs: list[list] = []
    for value in layers:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def _layers(runs: list[list]) -> tuple[bool, ...]:
    return tuple(value for value, count in runs for _ in range(count))
