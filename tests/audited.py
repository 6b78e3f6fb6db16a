"""Steps compiled for devices that are not there, and audited."""

import functools
import warnings

import jax

from tpjax.audit import targets
from tpjax.audit.verdict import Audit
from tpjax.buckets import Buckets
from tpjax.config import ModelConfig
from tpjax.executables import Executables
from tpjax.parallel.mesh import make_mesh
from tpjax.parallel.rules import Rules
from tpjax.patterns import Patterns
from tpjax.plan import Plan
from tpjax.weights import WeightTable


@functools.cache
def devices(hardware: str) -> list:
    """Of a CPU, those the tests have forced."""
    kind, _, count = hardware.partition(":")
    return jax.devices()[: int(count)] if kind == "cpu" else targets.devices(hardware)


def steps(
    config: ModelConfig,
    hardware: str = "h100:8",
    *,
    rows: int = 1,
    context: int = 8192,
    rules: Rules | None = None,
    sum_algorithm: str = "xla",
    patterns: Patterns = (),
    allow: tuple[str, ...] = (),
    **sizes: int,
) -> Executables:
    """Its steps; a model with a shorter context has its own. ``sizes`` of the mesh: by default
    tensor over all devices."""
    there = devices(hardware)
    mesh = make_mesh(**(sizes or {"tensor": len(there)}), devices=there)
    words = {"sum_algorithm": sum_algorithm, "patterns": patterns, "allow": allow}
    plan = Plan(mesh=mesh, rules=rules or Rules(), **words).fit(config)
    context = min(context, config.max_position)
    return Executables(WeightTable(config, plan), Buckets.make(context, rows, plan.data))


def compiled(steps: Executables, name: str):
    """The program of one step."""
    with warnings.catch_warnings():  # what jax keeps of these programs it cannot read without a GPU
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        return steps.lower(name).compile(steps.options(name))


def audited(config: ModelConfig, name: str, *more, greedy: bool = False, **words) -> Audit:
    exe = steps(config, *more, **words)
    return Audit(compiled(exe, name), exe, name, greedy)
