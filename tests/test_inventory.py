"""The planner's list of weights, made of facts, is the one that tracing the model gives."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.published import CONFIGS, LITERAL, published, resolved
from tpjax.cache import KVCache
from tpjax.facts import facts, from_facts
from tpjax.inventory import weights
from tpjax.parallel.layout import Layout
from tpjax.parallel.mesh import make_mesh
from tpjax.parallel.rules import sharding_word
from tpjax.plan import Plan
from tpjax.planner.models import find, table
from tpjax.weights import WeightTable

NAMES = sorted([*CONFIGS, *LITERAL])
MESHES = [
    dict(tensor=1),
    dict(tensor=8),
    dict(tensor=3),
    dict(tensor=2, data=2),
    dict(expert=2, tensor=2),
    dict(expert=4, tensor=1, data=2),
]


def plan_of(config, sizes):
    devices = jax.devices()[:1] * int(np.prod(list(sizes.values())))
    return Plan(mesh=make_mesh(devices=devices, **sizes)).fit(config)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_weights(name, sizes):
    """Paths, dimensions and order, which tracing compares; shardings and bytes. Of two layers, one
    of each kind."""
    config = published(name, 2)
    if "expert" in sizes and config.moe is None or np.prod(list(sizes.values())) > config.heads:
        return
    table, layout = WeightTable(config, plan_of(config, sizes)), Layout.of(**sizes).fit(config)
    assert table.module(table.abstract()).config == config
    traced = {s.path: (s.dims, sharding_word(s.sharding), s.bytes_per_device) for s in table.specs}
    counted = {w.path: (w.dims, w.sharding, w.bytes_per_device) for w in weights(config, layout)}
    assert counted == traced
    rows = 4 * table.plan.data
    cache = KVCache.abstract(config, table.plan, rows, 64)
    held = sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(cache)
    )
    assert held == rows // table.plan.data * 64 * layout.cached_per_token(config)


def test_a_model_that_declares_other_weights_is_not_traced(monkeypatch):
    config = published("llama-3.2-1b", 2)
    for change in ({"qkv_bias": True}, {"dtype": "float16"}, {"norm": "layer"}):
        table = WeightTable(config, plan_of(config, dict(tensor=2)))
        table.config = dataclasses.replace(config, **change)
        with pytest.raises(RuntimeError, match="list different weights"):
            table.module(table.abstract())


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_published_models(name):
    """models.json says what config.json says; made by writing `facts` of each there."""
    config, _, raw = resolved(name)
    dtype = raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"
    assert find(name).config == from_facts(facts(config) | {"dtype": dtype})
    assert table().keys() == set(NAMES)
