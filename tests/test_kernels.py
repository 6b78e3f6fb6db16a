"""What one token costs on GPUs beside reading the weights: kernels, graphs and copies of the step
as XLA compiles it for H100s, without one."""

import re

import pytest

from tests.audited import compiled, steps
from tpjax.audit.kernels import Launches, compiled_with_launches
from tpjax.audit.verdict import Audit
from tpjax.planner.memory import MIB
from tpjax.planner.models import find, shortened

CONTEXT = 8192
# Models, devices, and CUDA graphs of a step with three layers. One device has one graph; sums of
# several cut it, because XLA runs its own kernels for small sums, which no graph holds, and what is
# left between two sums must be five kernels or more to be a graph.
CASES = [
    ("llama-3.1-8b", 1, 1),
    ("llama-3.1-8b", 2, 6),
    ("llama-3.1-8b", 8, 5),
    ("llama-3.1-70b", 8, 6),
]


def decode(model: str, tensor: int, layers: int) -> tuple[Audit, Launches]:
    exe = steps(shortened(find(model).config, layers), f"h100:{tensor}", context=CONTEXT)
    program, launches = compiled_with_launches(exe.lower("decode[b1]"))
    assert launches is not None
    return Audit(program, exe, "decode[b1]", greedy=True), launches


@pytest.mark.parametrize("model, tensor, graphs", CASES)
def test_kernels_of_a_layer(greedy, model, tensor, graphs):
    """At most 14, two all-reduces, no copy; what is not a layer is counted apart, as the difference
    of three layers and two."""
    audit, of_three = decode(model, tensor, 3)
    _, of_two = decode(model, tensor, 2)
    assert of_three.kernels - of_two.kernels <= 14
    assert of_three.collectives - of_two.collectives == (2 if tensor > 1 else 0)
    assert of_three.copies == of_two.copies
    assert of_three.graphs == graphs
    assert audit.findings() == []  # nothing above 1 MiB copied or transposed
    assert audit.memory.temp_size_in_bytes < 64 * MIB


def test_a_prompt_has_no_scores_of_all_its_tokens(greedy):
    """A chunk of 512 tokens at the end of 8,192: what has 8,192 positions is the cache alone."""
    exe = steps(shortened(find("llama-3.1-8b").config, 1), "h100:1", context=CONTEXT)
    program = compiled(exe, "prefill[t512]")
    assert Audit(program, exe, "prefill[t512]", greedy=True).findings() == []
    shapes = set(re.findall(r"\w+\[([\d,]+)\]", program.as_text() or ""))
    long = {shape for shape in shapes if str(CONTEXT) in shape.split(",")}
    assert long and long <= {"1,8,8192,128", "8,8192,128"}
