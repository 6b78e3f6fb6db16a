"""Any degree: heads, MLP and vocabulary that it does not divide are padded, and nothing changes."""

import re

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import tpjax
from tests.reference import distance
from tpjax.buckets import Buckets
from tpjax.checkpoint import load
from tpjax.checkpoint.files import SINGLE
from tpjax.checkpoint.safetensors import SafetensorsFolder
from tpjax.checkpoint.tensors import Tensors
from tpjax.config import MoE
from tpjax.errors import UsageError
from tpjax.executables import Executables
from tpjax.models import find
from tpjax.padding import padding
from tpjax.parallel.degrees import even_degrees, spread
from tpjax.parallel.dims import Dim, place_heads
from tpjax.parallel.mesh import largest_degree, make_mesh
from tpjax.parallel.rules import Rules
from tpjax.plan import Plan
from tpjax.weights import WeightTable

FAST_TO_COMPILE = {"xla_backend_optimization_level": "0"}
SIZES = dict(family="llama", embed=24, layers=1, max_position=64)


@st.composite
def head_counts(draw):
    kv, group = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    return kv * group, kv


@given(head_counts(), st.integers(1, 12), st.integers(1, 8))
def test_every_head_has_one_place_beside_its_keys(counts, shards, copies):
    heads, kv_heads = counts
    placed = place_heads(heads, kv_heads, shards, copies)
    assert sorted(h for h in placed.queries if h >= 0) == list(range(heads))
    assert [h for h in placed.kv if h >= 0] == list(range(kv_heads))
    devices = shards * copies
    queries = np.reshape(placed.queries, (shards, copies, -1))
    kv = np.reshape(placed.kv, (shards, -1))
    assert queries.size % devices == 0
    group = heads // kv_heads
    for shard in range(shards):
        for copy in range(copies):
            # On a device, the places of its key/value heads follow one another, equally many each.
            local = queries[shard, copy].reshape(len(kv[shard]), -1)
            for places, head in zip(local, kv[shard], strict=True):
                assert all(q == -1 or q // group == head for q in places)


@given(st.data(), st.integers(1, 5), st.integers(0, 9), st.integers(0, 4))
def test_runs_say_what_every_place_holds(data, unit, stored, blank):
    order = data.draw(st.permutations([*range(stored), *[-1] * blank]))
    dim = Dim("heads", stored * unit, len(order) * unit, unit, tuple(order))
    low = data.draw(st.integers(0, dim.size))
    high = data.draw(st.integers(low, dim.size))
    if not order:
        return
    expected = [
        -1 if order[n // unit] < 0 else order[n // unit] * unit + n % unit for n in range(low, high)
    ]
    got = np.full(high - low, -1)
    for at, first, count in dim.runs(low, high):
        assert (got[at - low : at - low + count] == -1).all() and count > 0
        got[at - low : at - low + count] = range(first, first + count)
    assert got.tolist() == expected


@given(head_counts(), st.integers(1, 24))
def test_no_other_split_holds_fewer_heads(counts, degree):
    heads, kv_heads = counts
    config = tpjax.ModelConfig(heads=heads, kv_heads=kv_heads, head_dim=2, mlp=8, vocab=9, **SIZES)
    best = spread(config, 1, degree, 1)

    def cost(shards, copies):
        placed = place_heads(heads, kv_heads, shards, copies)
        return len(placed.queries) // degree + 2 * (len(placed.kv) // shards)

    others = [(d, degree // d) for d in range(1, degree + 1) if degree % d == 0]
    assert cost(best.tensor, best.rep) == min(cost(*of) for of in others)


@st.composite
def shapes(draw):
    heads, kv_heads = draw(head_counts().filter(lambda counts: counts[0] <= 12))
    sizes = dict(head_dim=2 * draw(st.integers(1, 4)), mlp=draw(st.integers(1, 40)))
    return dict(heads=heads, kv_heads=kv_heads, vocab=draw(st.integers(2, 60)), **sizes)


@pytest.mark.slow
@settings(max_examples=24, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(shape=shapes(), degree=st.integers(2, 8), biases=st.booleans(), seed=st.integers(0, 9))
def test_equal_to_one_device_or_refused(tmp_path_factory, shape, degree, biases, seed):
    """Logits, or a refusal whose suggestion then works."""
    words = dict(qkv_bias=biases, o_bias=biases, mlp_bias=biases)
    config = tpjax.ModelConfig(**SIZES, **shape, **words)
    folder = tmp_path_factory.mktemp("degree")
    family, random = find("llama", "here"), np.random.default_rng(seed)
    stored = {
        tensor.name: random.normal(0, tensor.shape[-1] ** -0.5, tensor.shape).astype(np.float32)
        for tensor in Tensors(WeightTable(config, Plan(mesh=make_mesh())), family).all
    }
    save_file(stored, folder / SINGLE)
    ids = random.integers(0, config.vocab, 24).astype(np.int32)

    def logits(tensor):
        plan = Plan(mesh=make_mesh(tensor=tensor)).fit(config)
        table = WeightTable(config, plan)
        exe = Executables(table, Buckets.make(32, 1, 1))
        run = exe.lower("score[t24]").compile(FAST_TO_COMPILE)
        weights = load.load(table, family, SafetensorsFolder(folder))
        args = ids[None], np.zeros(1, np.int32), np.full(1, len(ids), np.int32)
        _, out = run(weights, exe["zeros[b1]"](), *map(exe.upload, args))
        return np.asarray(out)[0, :, : config.vocab]

    try:
        got = logits(degree)
    except UsageError as error:
        assert degree > config.heads
        degree = int(re.findall(r"degree that works is (\d+)", str(error))[0])
        got = logits(degree)
    assert distance(got, logits(1)) <= 1e-5


def plan_of(config, **mesh):
    devices = jax.devices()[:1] * int(np.prod(list(mesh.values())))
    return Plan(mesh=make_mesh(devices=devices, **mesh)).fit(config)


QWEN = dict(heads=14, kv_heads=2, head_dim=64, mlp=4864, vocab=151936)


@pytest.mark.parametrize(
    "degree, said",
    [
        (2, None),
        (3, "padding: heads 14 -> 21, kv_heads 2 -> 3, mlp 4864 -> 4866, vocab 151936 -> 151938:"),
        (4, "padding: heads 14 -> 16:"),
        (7, "padding: mlp 4864 -> 4865, vocab 151936 -> 151942:"),
        (8, "padding: heads 14 -> 16:"),
    ],
)
def test_what_a_degree_costs_is_told(degree, said):
    """Qwen2.5-0.5B's sizes: 7 query heads for each of 2 key/value heads."""
    config = tpjax.ModelConfig(**SIZES | QWEN)
    table = WeightTable(config, plan_of(config, tensor=degree))
    cost = padding(table)
    zeros = sum(s.bytes - int(np.prod(s.stored)) * s.dtype.itemsize for s in table.specs)
    assert cost.weight_bytes == zeros and (zeros > 0) == (cost.weights > 0)
    assert cost.uneven == (said is not None)
    if said:
        assert said in str(cost) and "% FLOPs" in str(cost)
    assert (cost.flops > 0) == cost.uneven
    assert (degree in even_degrees(config)) == (not cost.uneven)


def test_experts_cost_what_is_chosen_of_them():
    """FLOPs count the chosen experts, bytes all of them."""
    moe = MoE(experts=6, per_token=2, mlp=10, layers=(True,))
    sizes = dict(heads=8, kv_heads=8, head_dim=2, mlp=10, vocab=8)
    config = tpjax.ModelConfig(**SIZES | sizes, moe=moe)
    cost = padding(WeightTable(config, plan_of(config, expert=4, tensor=1)))
    assert cost.sizes == {"experts": (6, 8)} and cost.flops == 0
    assert cost.weight_bytes == 2 * 3 * 10 * 24 * 4
    cost = padding(WeightTable(config, plan_of(config, expert=2, tensor=4)))
    assert cost.sizes == {"expert_mlp": (10, 12)} and cost.weight_bytes == 6 * 3 * 2 * 24 * 4
    assert cost.flops == pytest.approx(2 * 3 * 2 * 24 / (4 * 16 * 24 + 6 * 24 + 60 * 24 + 8 * 24))


def test_expert_devices_share_or_split_keys():
    """Whatever axis they are on, devices hold as few key/value heads as they can."""
    moe = MoE(experts=8, per_token=2, mlp=16, layers=(True,))
    for kv_heads, kv, copies in ((8, 8, 1), (4, 4, 2), (2, 2, 4), (1, 1, 8)):
        sizes = dict(heads=8, kv_heads=kv_heads, head_dim=2, mlp=16, vocab=8)
        config = tpjax.ModelConfig(**SIZES | sizes, moe=moe)
        plan = plan_of(config, expert=2, tensor=4)
        assert (plan.shards("kv_heads"), padding(WeightTable(config, plan)).copies) == (kv, copies)


@pytest.mark.parametrize(
    "axes, experts, nearest",
    [
        (dict(tensor=33), 0, "tensor degree that works is 32"),
        (dict(expert=2), 0, "use tensor: the nearest tensor degree that works is 2"),
        (dict(expert=16), 8, "expert=8 x tensor=2"),
        (dict(expert=4, tensor=16), 8, "expert=4 x tensor=8"),
    ],
)
def test_what_is_refused_gets_a_degree_of_its_own_size(axes, experts, nearest):
    """Of at most as many devices as were asked for, so that it can be followed."""
    moe = MoE(experts=experts, per_token=1, mlp=16, layers=(True,)) if experts else None
    config = tpjax.ModelConfig(
        **SIZES | dict(heads=32, kv_heads=8, head_dim=2, mlp=16, vocab=8, moe=moe)
    )
    with pytest.raises(UsageError, match=nearest):
        plan_of(config, **axes)


def test_even_degrees_of_mixtures():
    """Experts on devices of their own split everything else too; shared experts are split; dense
    widths count only where a layer is dense."""
    sizes = dict(heads=28, kv_heads=4, head_dim=2, vocab=8)

    def even(expert=1, mlp=7, dense=False, **more):
        facts = dict(experts=8, per_token=2, mlp=56, layers=(not dense,))
        moe = MoE(**facts | more)
        return even_degrees(tpjax.ModelConfig(**SIZES | sizes, mlp=mlp, moe=moe), expert)

    assert even() == [1, 2, 4, 28]
    assert even(dense=True, mlp=14) == [1, 2]
    assert even(shared_mlp=50) == [1, 2]
    assert even(expert=2) == [1, 2, 14]
    assert even(expert=3) == []


@pytest.mark.parametrize(
    "kv_heads, expert, devices, wanted", [(4, 2, 8, 2), (4, 4, 4, 1), (4, 3, 6, 1)]
)
def test_auto_takes_what_is_even_with_experts(monkeypatch, kv_heads, expert, devices, wanted):
    moe = MoE(experts=8, per_token=2, mlp=56, layers=(True,))
    config = tpjax.ModelConfig(
        **SIZES | dict(heads=28, kv_heads=kv_heads, head_dim=2, mlp=7, vocab=8, moe=moe)
    )
    monkeypatch.setattr(jax, "devices", lambda: list(range(devices)))
    assert largest_degree(config, expert=expert)[0] == wanted


def test_rules_of_ones_own_are_kept():
    config = tpjax.ModelConfig(heads=8, kv_heads=4, head_dim=2, mlp=16, vocab=8, **SIZES)
    plan = Plan(mesh=make_mesh(tensor=2), rules=Rules(kv_heads=())).fit(config)
    assert plan.rules.kv_heads == ()


def test_copies_are_told_where_nothing_is_padded():
    config = tpjax.ModelConfig(heads=8, kv_heads=2, head_dim=2, mlp=16, vocab=8, **SIZES)
    cost = padding(WeightTable(config, plan_of(config, tensor=8)))
    assert not cost.sizes and cost.costs
    assert cost.copied_bytes == 3 * 2 * (2 * 2 * 24) * 4
    assert str(cost).startswith("each key/value head is on 4 devices: 4 times the cache")


def test_rep_is_kept_as_given():
    config = tpjax.ModelConfig(heads=8, kv_heads=4, head_dim=2, mlp=16, vocab=8, **SIZES)
    mesh = Plan(mesh=make_mesh(tensor=2, rep=2)).fit(config).mesh
    assert (mesh.shape["tensor"], mesh.shape["rep"]) == (2, 2)
