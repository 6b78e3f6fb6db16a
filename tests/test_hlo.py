"""What the compiled programs hold: collectives, copies, memory; on CPU meshes and for 8 H100s."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from tests.hlo import collectives, decode_problems, large_moves
from tpjax.checkpoint.folder import config_only, with_dtype
from tpjax.config import ModelConfig
from tpjax.executables import Buckets, Executables
from tpjax.nn import embed as embed_module
from tpjax.parallel.mesh import make_mesh
from tpjax.parallel.rules import Rules
from tpjax.plan import Plan
from tpjax.weights import WeightTable

DATA = Path(__file__).parent / "data"
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
    compiled = exe.lower(f"decode[b{rows}]").compile()
    assert decode_problems(compiled, SMALL, exe.table.plan, rows, 64) == []


def test_prefill_has_the_same_sums():
    exe = executables(SMALL, Plan(mesh=make_mesh(tensor=4)), 64, 1)
    seen = collectives(exe.lower("prefill[t32]").compile().as_text())
    assert seen["all-reduce"] == 2 * SMALL.layers + 1 and set(seen) <= {"all-reduce", "all-gather"}


def test_the_other_sum_algorithm_is_two_halves():
    plan = Plan(mesh=make_mesh(tensor=4), sum_algorithm="rs_ag")
    seen = collectives(executables(SMALL, plan, 64, 1).lower("decode[b1]").compile().as_text())
    assert seen["all-reduce"] == 1 and seen["reduce-scatter"] == 2 * SMALL.layers


def test_bfloat16_on_a_cpu_neither_widens_nor_transposes_a_weight():
    """XLA's default would copy every weight to float32 on every call; see ops/matmul.py."""
    config = replace(SMALL, dtype="bfloat16", embed=512, mlp=2048, vocab=8192, layers=1)
    exe = executables(config, Plan(mesh=make_mesh(tensor=2)), 64, 4)
    smallest = config.embed * config.kv_heads * config.head_dim // 2  # elements, a key projection
    for name in ("decode[b1]", "decode[b4]", "prefill[t32]"):
        compiled = exe.lower(name).compile()
        text = compiled.as_text()
        assert text.count("__ynn_fusion") >= 8, f"{name}: products outside the fast path"
        moves = large_moves(text, 2 * smallest - 1)
        assert [m for m in moves if " bf16[" in m or " f32[" in m] == []
        assert compiled.memory_analysis().temp_size_in_bytes < 2 * config.vocab * config.embed // 2


@pytest.fixture(scope="module")
def h100():
    """Eight H100s to compile for; no GPU and no CUDA libraries are needed."""
    target = (DATA / "h100_sxm.txtpb").read_text()
    topology = topologies.get_topology_desc("", "cuda", target_config=target, topology="1x1x8")
    return make_mesh(tensor=8, devices=topology.devices)


def llama_70b(layers: int) -> ModelConfig:
    config = with_dtype(config_only(DATA / "llama-3.1-70b-instruct.json").config, "bfloat16")
    return replace(config, layers=layers)


def compile_70b(mesh, layers: int, rules: Rules | None = None):
    config = llama_70b(layers)
    plan = Plan(mesh=mesh, rules=rules or Rules())
    exe = executables(config, plan, 8192, 1)
    return exe.lower("decode[b1]").compile(), config, exe.table.plan


@pytest.mark.slow
def test_llama_70b_decode_for_eight_h100s(h100):
    """161 all-reduces, no copy above 1 MiB, at most 64 MiB temporary, the cache in place: batch 1,
    context 8192, the whole model, by the real compiler."""
    compiled, config, plan = compile_70b(h100, 80)
    assert decode_problems(compiled, config, plan, 1, 8192) == []
    assert collectives(compiled.as_text())["all-reduce"] == 161


def test_an_unsplit_weight_is_caught(h100):
    compiled, config, plan = compile_70b(h100, 2, Rules(mlp=()))
    problems = decode_problems(compiled, config, plan, 1, 8192)
    assert any("all-reduces" in p for p in problems) and any("arguments" in p for p in problems)


def test_a_gathered_table_is_caught(h100, monkeypatch):
    def plain_indexing(plan, table_VD, token_BT):
        return table_VD.at[token_BT].get(out_sharding=plan.spec("batch", None, "embed"))

    monkeypatch.setattr(embed_module, "lookup", plain_indexing)
    compiled, config, plan = compile_70b(h100, 2)
    assert decode_problems(compiled, config, plan, 1, 8192)


def test_a_sum_nobody_asked_for_is_a_type_error():
    """An explicit mesh refuses a product over a split axis until the program says where it is
    summed: the guarantee that the counts above rest on."""
    plan = Plan(mesh=make_mesh(tensor=2))
    x = jax.ShapeDtypeStruct((2, 8), jnp.float32, sharding=plan.sharding(None, "mlp"))
    w = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=plan.sharding("embed", "mlp"))
    with jax.set_mesh(plan.mesh), pytest.raises(Exception, match="(?i)shard"):
        jax.jit(lambda x, w: x @ w.T).lower(x, w)
