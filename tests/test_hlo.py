"""What the compiled programs hold: collectives, copies, memory; on CPU meshes and for 8 H100s."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tests.audited import audited, compiled, steps
from tests.published import published
from tpjax import native
from tpjax.audit import program
from tpjax.config import ModelConfig
from tpjax.ops.tiles import TILE
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan
from tpjax.planner.memory import MIB

SMALL = ModelConfig(
    family="llama", vocab=1031, embed=64, layers=3, heads=8, kv_heads=4, head_dim=8, mlp=96
)


def kinds(text: str) -> Counter:
    return Counter(one.kind for one in program.collectives(text, {"tensor": 8}))


@pytest.mark.parametrize("data, tensor", [(1, 1), (1, 2), (1, 4), (1, 8), (2, 4)])
@pytest.mark.parametrize("rows", [4, pytest.param(2, marks=pytest.mark.extra)])
def test_decode_on_a_cpu_mesh_has_only_the_planned_collectives(data, tensor, rows):
    words = {"rows": rows, "context": 64, "data": data, "tensor": tensor}
    assert audited(SMALL, f"decode[b{rows}]", "cpu:8", **words).findings() == []


def test_prefill_has_the_same_sums():
    assert audited(SMALL, "prefill[t32]", "cpu:4", context=64).findings() == []


def test_the_other_sum_algorithm_is_two_halves():
    audit = audited(SMALL, "decode[b1]", "cpu:4", context=64, sum_algorithm="rs_ag")
    seen = kinds(audit.text)
    assert seen["all-reduce"] == 1 and seen["reduce-scatter"] == 2 * SMALL.layers
    assert audit.findings() == []


def test_layers_share_their_temporaries(monkeypatch):
    """On a CPU without our kernels, where every product has a tile of its matrix widened."""
    monkeypatch.setattr(native, "ready", lambda: False)
    config = replace(SMALL, dtype="bfloat16", embed=512, mlp=2048)
    few, more = (
        compiled(steps(replace(config, layers=layers), "cpu:2", context=64), "decode[b1]")
        .memory_analysis()
        .temp_size_in_bytes
        for layers in (1, 4)
    )
    assert more < 1.1 * few


@pytest.mark.parametrize("data", [1, pytest.param(2, marks=pytest.mark.extra)])
@pytest.mark.parametrize("kernel", [True, False], ids=["our kernel", "no compiler"])
def test_bfloat16_on_a_cpu_neither_widens_nor_transposes_a_weight(monkeypatch, data, kernel):
    """XLA's default would copy every weight to float32 on every call; see ops/matmul.py. One row,
    and one row per replica, are the hard cases: without our kernel they meet a tile at a time."""
    if kernel and not native.ready():
        pytest.skip(native.why_not())
    monkeypatch.setattr(native, "ready", lambda: kernel)
    config = replace(SMALL, dtype="bfloat16", embed=512, mlp=2048, vocab=8192, layers=1)
    exe = steps(config, "cpu:8", context=64, rows=4, data=data, tensor=2)
    smallest = config.embed * config.kv_heads * config.head_dim // 2  # elements, a key projection
    for name in (f"decode[b{data}]", "decode[b4]", "prefill[t32]"):
        built = compiled(exe, name)
        text = built.as_text()
        fast = text.count("__ynn_fusion") + text.count(f'custom_call_target="{native.PRODUCT}"')
        tiled = not kernel and name == f"decode[b{data}]"  # a row meets tiles, which are widened
        assert tiled or fast >= 8, f"{name}: products outside the fast paths"
        least = 2 * TILE + 1 if tiled else 2 * smallest
        large = [one for one in program.made(text) if one.moves and one.array.bytes >= least]
        assert [one for one in large if one.array.dtype in ("bf16", "f32")] == []
        head = config.vocab * config.embed // 2  # elements; what is one tile may be widened early
        most = (4 if tiled else 2) * head
        assert built.memory_analysis().temp_size_in_bytes < most


@pytest.mark.slow
@pytest.mark.parametrize("layers", [16, pytest.param(80, marks=pytest.mark.extra)])
def test_llama_70b_decode_for_eight_h100s(layers):
    """Two all-reduces a layer and one, no copy above 1 MiB, the cache in place and next to nothing
    beside it: batch 1, context 8192, by the real compiler; when asked for, the whole model."""
    audit = audited(published("llama-3.1-70b-instruct", layers), "decode[b1]")
    assert audit.findings() == []
    assert kinds(audit.text)["all-reduce"] == 2 * layers + 1 == len(audit.sums())
    assert audit.memory.temp_size_in_bytes < 64 * MIB


def test_a_sum_nobody_asked_for_is_a_type_error():
    """An explicit mesh refuses a product over a split axis until the program says where it is
    summed: the guarantee that the counts above rest on."""
    plan = Plan(mesh=make_mesh(tensor=2))
    x = jax.ShapeDtypeStruct((2, 8), jnp.float32, sharding=plan.sharding(None, "mlp"))
    w = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=plan.sharding("embed", "mlp"))
    with jax.set_mesh(plan.mesh), pytest.raises(Exception, match="(?i)shard"):
        jax.jit(lambda x, w: x @ w.T).lower(x, w)
