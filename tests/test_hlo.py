"""What the compiled programs hold: collectives, copies, memory; on CPU meshes and for 8 H100s."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tests import h100
from tests.hlo import collectives, large_moves, problems
from tests.published import published
from tpjax.config import ModelConfig
from tpjax.executables import Buckets, Executables
from tpjax.nn import embed as embed_module
from tpjax.parallel.mesh import make_mesh
from tpjax.parallel.rules import Rules
from tpjax.plan import Plan
from tpjax.weights import WeightTable

SMALL = ModelConfig(
    family="llama", vocab=1031, embed=64, layers=3, heads=8, kv_heads=4, head_dim=8, mlp=96
)


def executables(config: ModelConfig, plan: Plan, context: int, rows: int) -> Executables:
    plan = plan.fit(config)
    return Executables(WeightTable(config, plan), Buckets.make(context, rows, plan.data))


@pytest.mark.parametrize("data, tensor", [(1, 1), (1, 2), (1, 4), (1, 8), (2, 4)])
@pytest.mark.parametrize("rows", [2, 4])
def test_decode_on_a_cpu_mesh_has_only_the_planned_collectives(data, tensor, rows):
    exe = executables(SMALL, Plan(mesh=make_mesh(data=data, tensor=tensor)), 64, rows)
    name = f"decode[b{rows}]"
    assert problems(exe.lower(name).compile(), exe, name) == []


def test_prefill_has_the_same_sums():
    exe = executables(SMALL, Plan(mesh=make_mesh(tensor=4)), 64, 1)
    seen = collectives(exe.lower("prefill[t32]").compile().as_text())
    assert seen["all-reduce"] == 2 * SMALL.layers + 1 and set(seen) <= {"all-reduce", "all-gather"}


def test_the_other_sum_algorithm_is_two_halves():
    plan = Plan(mesh=make_mesh(tensor=4), sum_algorithm="rs_ag")
    seen = collectives(executables(SMALL, plan, 64, 1).lower("decode[b1]").compile().as_text())
    assert seen["all-reduce"] == 1 and seen["reduce-scatter"] == 2 * SMALL.layers


@pytest.mark.parametrize("data", [1, 2])
def test_bfloat16_on_a_cpu_neither_widens_nor_transposes_a_weight(data):
    """XLA's default would copy every weight to float32 on every call; see nn/linear.py. One row,
    and one row per replica, are the hard cases."""
    config = replace(SMALL, dtype="bfloat16", embed=512, mlp=2048, vocab=8192, layers=1)
    exe = executables(config, Plan(mesh=make_mesh(data=data, tensor=2)), 64, 4)
    smallest = config.embed * config.kv_heads * config.head_dim // 2  # elements, a key projection
    for name in (f"decode[b{data}]", "decode[b4]", "prefill[t32]"):
        compiled = exe.lower(name).compile()
        text = compiled.as_text()
        assert text.count("__ynn_fusion") >= 8, f"{name}: products outside the fast path"
        moves = large_moves(text, 2 * smallest - 1)
        assert [m for m in moves if " bf16[" in m or " f32[" in m] == []
        assert compiled.memory_analysis().temp_size_in_bytes < 2 * config.vocab * config.embed // 2


@pytest.fixture(scope="module")
def mesh():
    return h100.mesh(tensor=8)


def problems_of_70b(mesh, layers: int, rules: Rules | None = None):
    exe = h100.steps(published("llama-3.1-70b-instruct", layers), mesh, rules=rules)
    compiled = h100.compiled(exe, "decode[b1]")
    return problems(compiled, exe, "decode[b1]"), compiled


@pytest.mark.slow
def test_llama_70b_decode_for_eight_h100s(mesh):
    """161 all-reduces, no copy above 1 MiB, the cache in place and next to nothing beside it:
    batch 1, context 8192, the whole model, by the real compiler."""
    found, compiled = problems_of_70b(mesh, 80)
    assert found == []
    assert collectives(compiled.as_text())["all-reduce"] == 161


def test_an_unsplit_weight_is_caught(mesh):
    found, _ = problems_of_70b(mesh, 2, Rules(mlp=()))
    assert any("all-reduces" in p for p in found) and any("arguments" in p for p in found)


def test_a_gathered_table_is_caught(mesh, monkeypatch):
    def plain_indexing(plan, table_VD, token_BT):
        return table_VD.at[token_BT].get(out_sharding=plan.spec("batch", None, "embed"))

    monkeypatch.setattr(embed_module, "lookup", plain_indexing)
    found, _ = problems_of_70b(mesh, 2)
    assert any("all-gather" in p or "temporary" in p for p in found), found


def test_a_sum_nobody_asked_for_is_a_type_error():
    """An explicit mesh refuses a product over a split axis until the program says where it is
    summed: the guarantee that the counts above rest on."""
    plan = Plan(mesh=make_mesh(tensor=2))
    x = jax.ShapeDtypeStruct((2, 8), jnp.float32, sharding=plan.sharding(None, "mlp"))
    w = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=plan.sharding("embed", "mlp"))
    with jax.set_mesh(plan.mesh), pytest.raises(Exception, match="(?i)shard"):
        jax.jit(lambda x, w: x @ w.T).lower(x, w)
