"""Predictions beside published measurements of other systems. Rows for BENCHMARKS.md.

python -m tpjax.bench.published --markdown
"""

import argparse
import statistics
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tpjax.parallel.layout import Layout
from tpjax.planner import chips
from tpjax.planner.memory import Footprint
from tpjax.planner.models import find
from tpjax.planner.report import table
from tpjax.planner.roofline import Roofline, Stack

FILE = Path(__file__).with_name("published.toml")
LENGTHS = ((128, 2048), (1000, 1000))  # prompt and output
WITHIN = 0.25
CONTEXT = 300  # of one sequence: what these measurements used, more or less


@dataclass(frozen=True)
class Figure:
    """One measurement and what is predicted for it, in tokens per second."""

    stack: str
    model: str
    hardware: str
    weight_bytes: int
    what: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def cells(self) -> tuple[str, ...]:
        bits = f"{8 * self.weight_bytes} bits"
        rates = f"{self.measured:,.1f}", f"{self.predicted:,.1f}"
        return self.stack, self.model, self.hardware, bits, self.what, *rates, f"{self.error:+.0%}"


HEAD = ("system", "model", "hardware", "weights", "what", "measured", "predicted", "error")


def figures() -> Iterator[Figure]:
    """All that are published there."""
    raw = tomllib.loads(FILE.read_text())
    stacks = {
        name: Stack(name, **{k: v for k, v in about.items() if k != "source"})
        for name, about in raw["stacks"].items()
    }
    for stack, model, hardware, size, measured in raw["single"]["figures"]:
        line = _line(stacks[stack], model, hardware, size)
        predicted = 1 / line.decode(1, CONTEXT).total
        yield Figure(stack, model, hardware, size, "one sequence", measured, predicted)
    for stack, model, hardware, size, rows, context, measured in raw["batch"]["figures"]:
        line = _line(stacks[stack], model, hardware, size)
        predicted = rows / line.decode(rows, context).total
        yield Figure(stack, model, hardware, size, f"{rows} sequences", measured, predicted)
    for stack, model, hardware, size, dtype, prompt, output, measured in raw["later"]["figures"]:
        predicted = _line(stacks[stack], model, hardware, size, dtype).throughput(prompt, output)
        what = f"{prompt} in, {output} out, later"
        yield Figure(stack, model, hardware, size, what, measured, predicted)
    for stack, model, hardware, size, dtype, *rates in raw["output"]["figures"]:
        line = _line(stacks[stack], model, hardware, size, dtype)
        for (prompt, output), measured in zip(LENGTHS, rates, strict=True):
            if measured:
                predicted = line.throughput(prompt, output)
                what = f"{prompt} in, {output} out"
                yield Figure(stack, model, hardware, size, what, measured, predicted)


def _line(stack: Stack, model: str, hardware: str, size: int, dtype: str | None = None) -> Roofline:
    there = chips.parse(hardware)
    config = replace(find(model).config, dtype="bfloat16")
    narrow = 1 if size == 1 else None
    layout = Layout.of(tensor=there.total).fit(config)
    # With 8-bit products the cache is in 8 bits too; of single sequences only the weights are.
    held = Footprint(config, layout, weight_bytes=narrow, kv_bytes=narrow if dtype else None)
    return Roofline(held, there, stack, dtype=dtype)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    found = list(figures())
    print("\n".join(table(HEAD, [figure.cells for figure in found], args.markdown)))
    errors = [abs(figure.error) for figure in found]
    outside = sum(error > WITHIN for error in errors)
    print(
        f"\n{len(found)} figures, median error {statistics.median(errors):.1%}, {outside} outside"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
