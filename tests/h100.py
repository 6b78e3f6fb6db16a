"""Compile published models' steps for H100s on a machine without a GPU; rows for BENCHMARKS.md.

python -m tests.h100 --all
python -m tests.h100 llama-3.1-70b-instruct "decode[b1]" "decode[b8]" "prefill[t512]"
"""

import resource
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from tests.hlo import MIB, collectives, large_moves, problems
from tests.published import CONFIGS, published, resolved
from tpjax import env
from tpjax.config import ModelConfig
from tpjax.executables import Buckets, Executables
from tpjax.padding import padding
from tpjax.parallel.mesh import make_mesh
from tpjax.parallel.rules import Rules
from tpjax.plan import Plan
from tpjax.weights import WeightTable

DATA = Path(__file__).parent / "data"
STEPS = ("decode[b1]", "prefill[t512]")
# The one has four heads, the other is small and has two key/value heads.
FEWER = {"gemma-3-1b-it": 4, "qwen2.5-0.5b": 2}


def mesh(**sizes: int) -> Mesh:
    """Some of eight H100s to compile for; neither a GPU nor CUDA's libraries are needed."""
    target = (DATA / "h100_sxm.txtpb").read_text()
    topology = topologies.get_topology_desc("", "cuda", target_config=target, topology="1x1x8")
    return make_mesh(**sizes, devices=topology.devices)


def steps(
    config: ModelConfig,
    mesh: Mesh,
    *,
    rows: int = 1,
    context: int = 8192,
    rules: Rules | None = None,
) -> Executables:
    """Its steps on this mesh; a model with a shorter context has its own."""
    plan = Plan(mesh=mesh, rules=rules or Rules()).fit(config)
    context = min(context, config.max_position)
    return Executables(WeightTable(config, plan), Buckets.make(context, rows, plan.data))


def compiled(steps: Executables, name: str):
    """The program of one step."""
    lowered = steps.lower(name)
    with warnings.catch_warnings():  # what jax keeps of these programs it cannot read without a GPU
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        return lowered.compile()


def row(model: str, exe: Executables, names: Sequence[str]) -> str:
    """What BENCHMARKS.md says of a model: a value for each of its steps, or one for all."""
    plan, each = exe.table.plan, []
    for name in names:
        start = _processor_seconds()
        program = compiled(exe, name)
        seconds = _processor_seconds() - start
        text, memory = program.as_text(), program.memory_analysis()
        seen = collectives(text)
        each.append(
            (
                f"{memory.argument_size_in_bytes / 1e9:.2f}",
                f"{memory.temp_size_in_bytes / MIB:.1f}",
                seen["all-reduce"],
                seen["all-gather"],
                len(large_moves(text)),
                f"{text.count(' fusion(') / exe.table.config.layers:.0f}",
                f"{seconds:.0f}",
                "; ".join(problems(program, exe, name)) or "none",
            )
        )
    cells = [model, " x ".join(f"{a}={n}" for a, n in plan.mesh.shape.items() if n > 1)]
    for values in zip(*each, strict=True):
        values = set(values) if len(set(values)) == 1 else values
        cells.append(" / ".join(map(str, values)))
    sizes = padding(exe.table).sizes
    cells.append(", ".join(f"{axis} {a} to {b}" for axis, (a, b) in sizes.items()) or "-")
    return " | ".join(cells)


def _processor_seconds() -> float:
    """Of this process and of those it has waited for, the assembler's."""
    of = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in of)


HEAD = (
    "model | devices | arguments GB | temporary MiB | all-reduces | all-gathers | copies > 1 MiB"
    " | fusions per layer | compile s | problems | padded"
)


def main(*words: str) -> None:
    """``--all``: every published model, whole; else one model and its steps."""
    env.start()
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"| {HEAD} |\n|{'---|' * (HEAD.count('|') + 1)}")
    model, *names = words
    todo = [(model, {"tensor": FEWER.get(model, 8)})]
    if model == "--all":
        todo = [(name, {"tensor": FEWER.get(name, 8)}) for name in CONFIGS]
        todo += [(name, {"expert": 8}) for name in CONFIGS if resolved(name)[0].moe]
    for name, sizes in todo:
        exe = steps(published(name), mesh(**sizes), rows=8)
        print(f"| {row(name, exe, names or STEPS)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
