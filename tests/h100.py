"""Compile Llama-3.1-70B steps for eight H100s on a machine without a GPU; rows for BENCHMARKS.md.

python -m tests.h100 "decode[b1]" "decode[b8]" "prefill[t512]"
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

from jax.experimental import topologies
from jax.sharding import Mesh

from tests.hlo import MIB, collectives, large_moves
from tpjax import env
from tpjax.checkpoint.folder import config_only, with_dtype
from tpjax.executables import Buckets, Executables
from tpjax.parallel.mesh import make_mesh
from tpjax.parallel.rules import Rules
from tpjax.plan import Plan
from tpjax.weights import WeightTable

DATA = Path(__file__).parent / "data"


def mesh() -> Mesh:
    """Eight H100s to compile for; neither a GPU nor CUDA's libraries are needed."""
    target = (DATA / "h100_sxm.txtpb").read_text()
    topology = topologies.get_topology_desc("", "cuda", target_config=target, topology="1x1x8")
    return make_mesh(tensor=8, devices=topology.devices)


def llama_70b(
    mesh: Mesh, *, layers: int = 80, rows: int = 1, context: int = 8192, rules: Rules | None = None
) -> Executables:
    """Its steps in bfloat16, with as many layers as asked for."""
    config = with_dtype(config_only(DATA / "configs" / "llama-3.1-70b-instruct.json").config, "bfloat16")
    config = replace(config, layers=layers)
    plan = Plan(mesh=mesh, rules=rules or Rules()).fit(config)
    return Executables(WeightTable(config, plan), Buckets.make(context, rows, plan.data))


def main() -> None:
    env.start()
    steps = llama_70b(mesh(), rows=8)
    print("| step | arguments GB | aliased GB | temporary MiB | all-reduces | all-gathers", end="")
    print(
        " | copies > 1 MiB | fusions per layer | compile s |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in sys.argv[1:]:
        start = time.perf_counter()
        compiled = steps.lower(name).compile()
        seconds = time.perf_counter() - start
        text, memory = compiled.as_text(), compiled.memory_analysis()
        seen = collectives(text)
        cells = (
            f"`{name}`",
            f"{memory.argument_size_in_bytes / 1e9:.2f}",
            f"{memory.alias_size_in_bytes / 1e9:.2f}",
            f"{memory.temp_size_in_bytes / MIB:.1f}",
            seen["all-reduce"],
            seen["all-gather"],
            len(large_moves(text)),
            f"{text.count(' fusion(') / steps.table.config.layers:.0f}",
            f"{seconds:.0f}",
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
