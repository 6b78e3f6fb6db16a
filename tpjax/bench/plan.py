"""The plan beside the compiler: argument and temporary bytes of many steps compiled for H100s on a
machine without a GPU, and what `tpjax plan` says of them. Rows for BENCHMARKS.md.

    python -m tpjax.bench.plan --markdown > table.md
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tqdm import tqdm

from tpjax.audit import steps, targets
from tpjax.audit.kernels import compiled_with_launches
from tpjax.planner.memory import MIB, Footprint, temporary
from tpjax.planner.models import find, shortened
from tpjax.planner.report import table

HEAD = (
    "model",
    "layers",
    "mesh",
    "dtype",
    "step",
    "context",
    "arguments",
    "differ by",
    "temporary MiB",
    "planned MiB",
    "differ by",
    "total",
)


@dataclass(frozen=True)
class Point:
    """One step of one model on one mesh. ``layers``: 0 is all of them."""

    model: str
    axes: tuple[tuple[str, int], ...]
    dtype: str
    step: str
    rows: int
    context: int
    layers: int = 2


@dataclass(frozen=True)
class Row:
    """What the compiler says of a point, and what the plan said. Bytes on a device."""

    point: Point
    arguments: int
    planned_arguments: int
    temporary: int
    planned_temporary: int

    @property
    def agrees(self) -> bool:
        """Arguments to the byte, temporaries within 10 % or 32 MiB, the total within 3 %."""
        apart = abs(self.temporary - self.planned_temporary)
        total = self.arguments + self.temporary
        return (
            self.arguments == self.planned_arguments
            and apart <= max(self.temporary // 10, 32 * MIB)
            and apart <= 0.03 * total
        )

    @property
    def cells(self) -> tuple[str, ...]:
        p, total = self.point, self.arguments + self.temporary
        planned = self.planned_arguments + self.planned_temporary
        return (
            p.model,
            str(p.layers or "all"),
            " x ".join(f"{a}={n}" for a, n in p.axes),
            p.dtype,
            p.step,
            str(p.context),
            f"{self.arguments:,}",
            f"{self.planned_arguments - self.arguments}",
            f"{self.temporary / MIB:.1f}",
            f"{self.planned_temporary / MIB:.1f}",
            f"{(self.planned_temporary - self.temporary) / MIB:+.1f}",
            f"{planned / total - 1:+.2%}",
        )


STEPS = (
    ("decode[b1]", 1, 2048),
    ("decode[b1]", 1, 8192),
    ("decode[b8]", 8, 2048),
    ("decode[b32]", 32, 8192),
    ("prefill[t512]", 1, 2048),
    ("prefill[t512]", 1, 8192),
    ("prefill[t128]", 1, 8192),
)
MESHES = {
    "llama-3.1-8b-instruct": [
        {"tensor": 1},
        {"tensor": 2},
        {"tensor": 8},
        {"data": 2, "tensor": 4},
    ],
    "llama-3.1-70b-instruct": [{"tensor": 2}, {"tensor": 8}],
    "gemma-2-9b-it": [{"tensor": 1}, {"tensor": 8}],
    "mixtral-8x7b-v0.1": [{"tensor": 8}, {"expert": 8}],
    "qwen2.5-7b-instruct": [{"tensor": 8}],
    "opt-175b": [{"tensor": 8}],
}
WHOLE = {"llama-3.2-1b": [{"tensor": 1}, {"tensor": 8}]}


def points() -> list[Point]:
    """All that the table has: more than a hundred, no two alike."""
    return list(dict.fromkeys(_points()))


def _points() -> Iterator[Point]:
    for layers, models in ((2, MESHES), (0, WHOLE)):
        for model, meshes in models.items():
            longest = find(model).config.max_position
            for axes, (step, rows, context) in itertools.product(meshes, STEPS):
                dtypes = ("bfloat16", "float32") if "3.1-8b" in model else ("bfloat16",)
                for dtype in dtypes:
                    if context <= longest and rows % axes.get("data", 1) == 0 or rows == 1:
                        where = tuple(axes.items())
                        yield Point(model, where, dtype, step, rows, min(context, longest), layers)


def measure(point: Point) -> Row:
    """Compile one step for H100s and ask the plan for the same."""
    config = replace(find(point.model).config, dtype=point.dtype)
    if point.layers:
        config = shortened(config, point.layers)
    axes = dict(point.axes)
    count = 1
    for size in axes.values():
        count *= size
    devices = targets.devices(f"h100:{count}")
    data = axes.get("data", 1)
    exe = steps.executables(config, devices, axes, max(point.rows, data), point.context)
    name = point.step if data == 1 or point.rows > 1 else point.step.replace("b1]", f"b{data}]")
    compiled, _ = compiled_with_launches(exe.lower(name), exe.options(name))
    memory = compiled.memory_analysis()
    assert memory is not None
    layout = exe.table.plan.layout
    decode = name.startswith("decode")
    each = max(point.rows, data) // data if decode else 1
    tokens = 1 if decode else int(name[len("prefill[t") : -1])
    return Row(
        point,
        memory.argument_size_in_bytes,
        Footprint(config, layout).arguments(each, tokens, exe.buckets.context),
        memory.temp_size_in_bytes,
        temporary(config, layout, each, tokens, exe.buckets.context),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th point only")
    args = parser.parse_args()
    chosen = points()[:: args.every]
    rows = [measure(point) for point in tqdm(chosen, file=sys.stderr, unit="step")]
    print("\n".join(table(HEAD, [row.cells for row in rows], args.markdown)))
    wrong = [row for row in rows if not row.agrees]
    print(f"\n{len(rows)} steps, {len(wrong)} outside the limits")
    for row in wrong:
        print("outside:", *row.cells)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
