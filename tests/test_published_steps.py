"""Steps of published models of every family, compiled for eight H100s on a machine without a GPU;
and what reading experts costs, there and on a CPU."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tests.audited import audited
from tests.published import published, resolved
from tpjax.checkpoint.folder import with_dtype
from tpjax.models import FAMILIES
from tpjax.ops import experts, sample
from tpjax.planner.memory import MIB

EIGHT = {"tensor": 8}
COMPILED = {
    "llama-3.2-3b": EIGHT,
    "mistral-7b-v0.1": EIGHT,
    "mixtral-8x7b-v0.1": EIGHT,
    "qwen2.5-7b-instruct": EIGHT,  # 28 heads: padded
    "qwen1.5-moe-a2.7b": EIGHT,
    "qwen3-8b": EIGHT,
    "qwen3-30b-a3b": EIGHT,
    "gemma-2b": EIGHT,
    "gemma-2-9b-it": EIGHT,
    "gemma-3-1b-it": {"tensor": 4},  # it has four heads
    "phi-3-mini-4k": EIGHT,
    "opt-125m": EIGHT,  # 12 heads: padded
}
STEPS = ("decode[b1]", "prefill[t512]")
CASES = [(name, sizes, step) for name, sizes in COMPILED.items() for step in STEPS] + [
    ("mixtral-8x7b-v0.1", {"expert": 8}, "decode[b1]"),
    ("llama-3.2-3b", {"tensor": 5}, "decode[b1]"),
]


@pytest.fixture
def greedy(monkeypatch):
    """A sampler for greedy requests only. It knows no families, and is most of what is compiled;
    the whole of it is in test_hlo.py and in `tpjax audit`."""
    monkeypatch.setattr(sample, "_any", lambda flag_B, axes: jnp.bool_(False))


def found_in(config, step: str, hardware: str = "h100:8", **more) -> list[str]:
    return list(map(str, audited(config, step, hardware, greedy=True, **more).findings()))


@pytest.mark.parametrize("name, sizes, step", CASES, ids=str)
def test_compiled_for_h100s(greedy, name, sizes, step):
    """Two layers, one of each kind where there are two: two all-reduces each and the embedding's,
    the sampler's one all-gather, every byte accounted for; no weight and no expert is copied."""
    assert found_in(published(name, 2), step, f"h100:{math.prod(sizes.values())}", **sizes) == []


def test_every_family_is_compiled():
    assert {resolved(name)[0].family for name in COMPILED} == FAMILIES.keys() - {"gemma3"}


def test_an_expert_copied_on_a_gpu_is_caught(greedy, monkeypatch):
    pairs = experts._pairs

    def copied_first(x_RD, weights, expert_RX, *more):
        router_ED, *of_experts = weights
        chosen = (jax.lax.optimization_barrier(w[expert_RX[0]]) for w in of_experts)
        expert_RX = jnp.arange(expert_RX.shape[1], dtype=jnp.int32)[None]
        return pairs(x_RD, experts.Experts(router_ED, *chosen), expert_RX, *more)

    monkeypatch.setattr(experts, "_pairs", copied_first)
    found = found_in(published("mixtral-8x7b-v0.1", 2), "decode[b1]")
    assert any("an expert has" in p for p in found), found


# --- experts on a CPU


def scaled_down(dtype: str):
    """Mixtral with matrices of experts that are larger than what is copied of them at a time."""
    config = with_dtype(published("mixtral-8x7b-v0.1", 2), dtype)
    sizes = dict(embed=512, mlp=1792, heads=8, kv_heads=2, head_dim=64, vocab=4096)
    config = replace(config, **sizes, moe=replace(config.moe, mlp=1792))
    assert 512 * 1792 * jnp.dtype(dtype).itemsize > max(MIB, experts.TILE)
    return config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_on_a_cpu_are_read_where_they_are(greedy, dtype):
    assert found_in(scaled_down(dtype), "decode[b1]", "cpu:1", context=512) == []


def test_an_expert_copied_on_a_cpu_is_caught(greedy, monkeypatch):
    config = scaled_down("float32")
    monkeypatch.setattr(experts, "TILE", 1 << 30)
    found = found_in(config, "decode[b1]", "cpu:1", context=512)
    assert any("an expert has" in p for p in found), found


def test_experts_widened_on_a_cpu_are_caught(greedy, monkeypatch):
    monkeypatch.setattr(experts, "_slice_of_bits", jax.lax.dynamic_slice)
    found = found_in(scaled_down("bfloat16"), "decode[b1]", "cpu:1", context=512)
    assert any("an expert has" in p for p in found), found
