"""Compile published models' steps for H100s on a machine without a GPU; rows for BENCHMARKS.md.

python -m tests.h100 --all
python -m tests.h100 llama-3.1-70b-instruct "decode[b1]" "decode[b8]" "prefill[t512]"
"""

import sys
import time
import warnings
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from tests.hlo import MIB, collectives, large_moves, problems
from tests.published import CONFIGS, published
from tpjax import env
from tpjax.config import ModelConfig
from tpjax.executables import Buckets, Executables
from tpjax.padding import padding
from tpjax.parallel.mesh import make_mesh
from tpjax.parallel.rules import Rules
from tpjax.plan import Plan
from tpjax.weights import WeightTable

DATA = Path(__file__).parent / "data"
# Eight devices are more than the one's heads, and would be mostly padding to the other's.
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


def row(model: str, steps: Executables, name: str) -> list:
    """What BENCHMARKS.md says of one step."""
    start = time.perf_counter()
    program = compiled(steps, name)
    seconds = time.perf_counter() - start
    text, memory, plan = program.as_text(), program.memory_analysis(), steps.table.plan
    seen, sizes = collectives(text), padding(steps.table).sizes
    return [
        model,
        " x ".join(f"{a}={n}" for a, n in plan.mesh.shape.items() if n > 1),
        f"`{name}`",
        f"{memory.argument_size_in_bytes / 1e9:.2f}",
        f"{memory.alias_size_in_bytes / 1e9:.2f}",
        f"{memory.temp_size_in_bytes / MIB:.1f}",
        seen["all-reduce"],
        seen["all-gather"],
        len(large_moves(text)),
        f"{text.count(' fusion(') / steps.table.config.layers:.0f}",
        f"{seconds:.0f}",
        ", ".join(f"{axis} {a} to {b}" for axis, (a, b) in sizes.items()) or "-",
        "; ".join(problems(program, steps, name)) or "none",
    ]


HEAD = (
    "model | devices | step | arguments GB | aliased GB | temporary MiB | all-reduces | all-gathers"
    " | copies > 1 MiB | fusions per layer | compile s | padded | problems"
)


def main(*words: str) -> None:
    """``--all``: every published model, whole; else one model and its steps."""
    env.start()
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"| {HEAD} |\n|{'---|' * (HEAD.count('|') + 1)}")
    models = list(CONFIGS) if words[0] == "--all" else words[:1]
    for model in models:
        exe = steps(published(model), mesh(tensor=FEWER.get(model, 8)), rows=8)
        for name in words[1:] or ("decode[b1]", "prefill[t512]"):
            print("| " + " | ".join(map(str, row(model, exe, name))) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
