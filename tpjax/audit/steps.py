"""The steps of a model on some devices, on abstract weights: what an audit compiles."""

from tpjax.buckets import Buckets
from tpjax.config import ModelConfig
from tpjax.errors import UsageError
from tpjax.executables import Executables
from tpjax.parallel.mesh import make_mesh
from tpjax.patterns import Patterns
from tpjax.plan import Plan
from tpjax.weights import WeightTable


def executables(
    config: ModelConfig,
    devices: list,
    sizes: dict[str, int],
    batch: int,
    context: int,
    patterns: Patterns = (),
    allow: tuple[str, ...] = (),
) -> Executables:
    """The model's steps on a mesh of these sizes, with ``batch`` sequences at most."""
    mesh = make_mesh(**sizes, devices=devices)
    plan = Plan(mesh=mesh, patterns=patterns, allow=allow).fit(config)
    return Executables(WeightTable(config, plan), Buckets.make(context, batch, plan.data))


def names(exe: Executables, kind: str | None, batch: int) -> list[str]:
    """Decode of so many sequences and prefill of the largest chunk, or one of them."""
    rows = exe.buckets.batch_for(batch)
    every = {"decode": f"decode[b{rows}]", "prefill": f"prefill[t{exe.buckets.chunks[-1]}]"}
    if kind is not None and kind not in every:
        raise UsageError(f"step {kind!r}: known are {', '.join(every)}")
    return [every[kind]] if kind else list(every.values())
