"""What one token costs on GPUs beside reading the weights: kernels, graphs and copies of the step
as XLA compiles it for H100s, without one."""

import re

import pytest

from tests.audited import compiled, steps
from tpjax import env
from tpjax.audit.kernels import Launches, compiled_with_launches
from tpjax.audit.verdict import Audit
from tpjax.errors import UsageError
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
    program, launches = compiled_with_launches(exe.lower("decode[b1]"), exe.options("decode[b1]"))
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


@pytest.mark.parametrize("model, tensor", [case[:2] for case in CASES if case[1] > 1])
def test_sums_in_the_graph(greedy, monkeypatch, model, tensor):
    """If asked for: one graph a step, nothing beside it, and the same program."""
    _, cut = decode(model, tensor, 3)
    monkeypatch.setenv("TPJAX_GRAPHED_SUMS", "1")
    audit, whole = decode(model, tensor, 3)
    assert cut.outside > 0 and (whole.graphs, whole.outside) == (1, 0)
    held = (whole.kernels, whole.copies, whole.collectives)
    assert held == (cut.kernels, cut.copies, cut.collectives)
    assert audit.findings() == []


def test_sums_in_the_graphs_of_the_whole_sampler(monkeypatch):
    """Its branches lie between two graphs; nothing else is outside."""
    monkeypatch.setenv("TPJAX_GRAPHED_SUMS", "1")
    exe = steps(shortened(find("llama-3.1-8b").config, 2), "h100:8", context=CONTEXT)
    _, launches = compiled_with_launches(exe.lower("decode[b1]"), exe.options("decode[b1]"))
    assert launches is not None and (launches.graphs, launches.outside) == (2, 0)


def test_options_are_for_decode_on_several_gpus_and_for_cpus(monkeypatch):
    """And an executable that is kept is known by them."""
    config = shortened(find("llama-3.1-8b").config, 1)
    gpus, one, cpus = (steps(config, hardware) for hardware in ("h100:2", "h100:1", "cpu:2"))
    before = gpus._about("decode[b1]"), gpus._about("prefill[t32]")
    assert gpus.options("decode[b1]") == {}
    monkeypatch.setenv("TPJAX_GRAPHED_SUMS", "1")
    assert gpus.options("decode[b1]").keys() == {"xla_gpu_enable_command_buffer"}
    assert gpus.options("prefill[t32]") == one.options("decode[b1]") == {}
    assert cpus.options("decode[b1]").keys() == {"xla_cpu_scheduler_type"}
    assert gpus._about("decode[b1]") != before[0] and gpus._about("prefill[t32]") == before[1]
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_DEFAULT")
    assert cpus.options("decode[b1]") == {}  # it is the user's to say


@pytest.mark.parametrize(
    "jaxlib, flags, said",
    [
        ("0.11.2", "", "needs jaxlib 0.10"),
        ("0.10.2", "--xla_gpu_enable_command_buffer=", "set one"),
    ],
)
def test_options_that_cannot_be(monkeypatch, jaxlib, flags, said):
    monkeypatch.setenv("TPJAX_GRAPHED_SUMS", "1")
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr("importlib.metadata.version", lambda package: jaxlib)
    with pytest.raises(UsageError, match=said):
        env.compiler_options("gpu", "decode", 2)


def test_a_prompt_has_no_scores_of_all_its_tokens(greedy):
    """A chunk of 512 tokens at the end of 8,192: what has 8,192 positions is the cache alone."""
    exe = steps(shortened(find("llama-3.1-8b").config, 1), "h100:1", context=CONTEXT)
    program = compiled(exe, "prefill[t512]")
    assert Audit(program, exe, "prefill[t512]", greedy=True).findings() == []
    shapes = set(re.findall(r"\w+\[([\d,]+)\]", program.as_text() or ""))
    long = {shape for shape in shapes if str(CONTEXT) in shape.split(",")}
    assert long and long <= {"1,8,8192,128", "8,8192,128"}


@pytest.mark.parametrize("model, tensor", [("llama-3.1-8b", 1), ("llama-3.1-70b", 8)])
def test_a_short_cache_is_all_that_is_read(greedy, model, tensor):
    """The program of a quarter of the context is as good: no copy, and no kernel more."""
    exe = steps(shortened(find(model).config, 2), f"h100:{tensor}", context=CONTEXT, rows=8)
    seen = []
    for name in ("decode[b8]", "decode[b8,s2048]"):
        program, launches = compiled_with_launches(exe.lower(name), exe.options(name))
        audit = Audit(program, exe, name, greedy=True)
        assert audit.findings() == [] and launches is not None
        seen.append((launches.kernels, audit.memory.alias_size_in_bytes))
        assert (f",{CONTEXT},128]" in audit.text) == (name == "decode[b8]")
    (kernels, cache), (of_short, short) = seen
    assert of_short <= kernels and short == cache // 4
