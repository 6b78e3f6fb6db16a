"""Steps of published models of every family, compiled for eight H100s on a machine without a GPU;
and what reading experts costs, there and on a CPU."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tests import budgets
from tests.audited import audited
from tests.budgets import CASES
from tests.published import published, resolved
from tpjax import native
from tpjax.audit.verdict import WIDENED
from tpjax.checkpoint.folder import with_dtype
from tpjax.models import FAMILIES
from tpjax.ops import experts, tiles
from tpjax.planner.memory import MIB

BUDGETS = json.loads(budgets.FILE.read_text())


def found_in(config, step: str, hardware: str = "h100:8", **more) -> list[str]:
    return list(map(str, audited(config, step, hardware, greedy=True, **more).findings()))


def _cases():
    """Prefill by default of every sixth model: it has the same products as decode."""
    for n, (name, sizes, step) in enumerate(CASES):
        usual = step.startswith("decode") or n % 12 == 5
        marks = () if usual else pytest.mark.extra
        yield pytest.param(name, sizes, step, marks=marks, id=budgets.key(name, sizes, step))


@pytest.mark.parametrize("name, sizes, step", list(_cases()))
def test_compiled_for_h100s(greedy, name, sizes, step):
    """Two layers, one of each kind where there are two: as their plan states (two all-reduces each
    and the embedding's, every byte accounted for, no weight moved), and within its budget."""
    audit, costs = budgets.audit(name, sizes, step)
    assert audit.findings() == []
    assert budgets.within(costs, BUDGETS[budgets.key(name, sizes, step)]) == []


def test_every_family_is_compiled():
    names = budgets.MODELS
    assert {resolved(name)[0].family for name in names} == FAMILIES.keys() - {"gemma3"}


def test_more_than_the_budget_is_told():
    budget = next(iter(BUDGETS.values()))
    more = json.loads(json.dumps(budget))
    assert budgets.within(more, budget) == []
    more["temporary"] *= 2
    more["launches"]["kernels"] += 1
    more["collectives"]["all-reduce"] += 1
    assert len(budgets.within(more, budget)) == 3


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
    sizes = dict(embed=512, mlp=7168, heads=8, kv_heads=2, head_dim=64, vocab=4096)
    config = replace(config, **sizes, moe=replace(config.moe, mlp=7168))
    assert 512 * 7168 * jnp.dtype(dtype).itemsize > max(MIB, WIDENED)
    return config


@pytest.mark.parametrize("kernel", [True, False], ids=["our kernel", "no kernel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_on_a_cpu_are_read_where_they_are(greedy, monkeypatch, dtype, kernel):
    if kernel and not native.ready():
        pytest.skip(native.why_not())
    monkeypatch.setattr(native, "ready", lambda: kernel)
    assert found_in(scaled_down(dtype), "decode[b1]", "cpu:1", context=512) == []


def test_an_expert_copied_on_a_cpu_is_caught(greedy, monkeypatch):
    config = scaled_down("float32")
    monkeypatch.setattr(native, "ready", lambda: False)
    monkeypatch.setattr(tiles, "TILE", 1 << 30)
    found = found_in(config, "decode[b1]", "cpu:1", context=512)
    assert any("an expert has" in p for p in found), found


def test_experts_widened_on_a_cpu_are_caught(greedy, monkeypatch):
    def wide(w, at, sizes):
        cut = jax.lax.dynamic_slice(w, at, sizes)
        return jax.lax.bitcast_convert_type(cut, jnp.uint16)

    monkeypatch.setattr(native, "ready", lambda: False)
    monkeypatch.setattr(tiles, "_cut_bits", wide)
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda x: x)
    found = found_in(scaled_down("bfloat16"), "decode[b1]", "cpu:1", context=512)
    assert any("an expert has" in p for p in found), found
