"""The comparison with transformers is sharp: each of these wrong programs fails it."""

import jax
import jax.numpy as jnp
import pytest
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests import tiny
from tests.reference import agrees, load
from tests.wrong import attending, norm_is_right, row_bias_on_every_device
from tpjax.models import common, find
from tpjax.nn import attention, embed
from tpjax.nn.norm import RMSNorm
from tpjax.nn.param import value
from tpjax.ops.attention_ref import Scores
from tpjax.plan import Plan
from tpjax.rope import Rope

# Everything a mutation could hide behind is on: at tensor=4 each device has two key/value heads
# with two query heads each, a part of the vocabulary, and a part of every row-parallel product.
FACTS = {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "attention_bias": True,
    "mlp_bias": True,
    "rms_norm_eps": 1e-2,
    "rope_parameters": tiny.LLAMA3_ROPE,
}


@pytest.fixture
def right(tiny_model, xla_attention):
    """Whether tpjax, as it is at the moment of the call, agrees with transformers. Without our own
    kernel for CPUs, of which these mutations know nothing."""
    folder, hf = tiny_model(**FACTS)
    return lambda: agrees(load(folder, 4, max_model_len=64), hf)


def rope_scaling_dropped(patch):
    patch.setattr(common, "rope", lambda parameters, hf: Rope(theta=parameters["rope_theta"]))


def gate_and_up_swapped(patch):
    names = find("llama", "here").names
    for leaf in ("w", "b"):
        gate, up = (f"blocks.{{layer}}.mlp.{half}.{leaf}" for half in ("gate", "up"))
        gates, ups = names[gate], names[up]
        patch.setitem(names, gate, ups)
        patch.setitem(names, up, gates)


def sum_missing(patch):
    def wrong(self, y, partial, *axes, onto=None):
        if not partial:
            return y
        specs = {"in_specs": self.spec(*axes, partial=partial), "out_specs": self.spec(*axes)}
        y = jax.shard_map(lambda mine: mine, **specs, check_vma=False)(y)
        return y if onto is None else y + onto

    patch.setattr(Plan, "sum", wrong)


def norm_weight_dropped(patch):
    call = RMSNorm.__call__
    patch.setattr(RMSNorm, "__call__", lambda self, x: call(self, x) / value(self.w)[None, None])


def norm_eps_of_another_model(patch):
    init = RMSNorm.__init__
    wrong = lambda self, size, *, eps, **more: init(self, size, eps=1e-5, **more)  # noqa: E731
    patch.setattr(RMSNorm, "__init__", wrong)


def rope_interleaved(patch):
    def wrong(x, cos_sin):
        cos, sin = cos_sin
        a, b = x[..., 0::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)

    patch.setattr(attention, "rotate", wrong)


def embedding_without_mask(patch):
    def wrong(plan, table, token):
        axes = plan.mesh_axes("vocab")

        def local(table, token):
            row = token - jax.lax.axis_index(axes) * table.shape[0]
            return jax.lax.psum(table[jnp.clip(row, 0, table.shape[0] - 1)], axes)

        specs = (plan.spec("vocab", "embed"), plan.spec("batch", None))
        out = plan.spec("batch", None, "embed")
        return jax.shard_map(local, mesh=plan.mesh, in_specs=specs, out_specs=out)(table, token)

    patch.setattr(embed, "lookup", wrong)


def tiled(q, k):
    """One key/value head per query head, but in the order 0 1 0 1 where 0 0 1 1 is right."""
    return jnp.tile(k, (1, q.shape[2] // k.shape[1], 1, 1))


MUTATIONS = {
    f.__name__: f
    for f in (
        rope_scaling_dropped,
        gate_and_up_swapped,
        row_bias_on_every_device,
        sum_missing,
        norm_weight_dropped,
        norm_eps_of_another_model,
        rope_interleaved,
        embedding_without_mask,
    )
} | {
    "kv_heads_tiled": attending(lambda q, k, v, *rest: (q, tiled(q, k), tiled(q, v), *rest)),
    "mask_shows_the_next_token": attending(lambda q, k, v, at, scores: (q, k, v, at + 1, scores)),
    "mask_hides_the_own_token": attending(lambda q, k, v, at, scores: (q, k, v, at - 1, scores)),
    "softmax_scale_of_embed": attending(lambda *args: (*args[:4], Scores(64**-0.5))),
}


def test_unmutated(right):
    """The program these mutations start from agrees."""
    assert right()


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
def test_mutation_is_caught(right, monkeypatch, mutate):
    """A wrong program runs to its end, on four devices, and its logits are not transformers'."""
    mutate(monkeypatch)
    assert not right()


def in_bfloat16(self, x):
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return value(self.w)[None, None] * (x * jax.lax.rsqrt(mean + jnp.bfloat16(self.eps)))


def weight_before_the_cast(self, x):
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return (value(self.w).astype(jnp.float32)[None, None] * (x32 * scale)).astype(x.dtype)


@pytest.mark.parametrize("wrong", [in_bfloat16, weight_before_the_cast])
def test_norm_cast_is_caught(monkeypatch, wrong):
    """The norm is float32 inside and cast before the weight; neither may be left out."""
    assert norm_is_right(LlamaRMSNorm)
    monkeypatch.setattr(RMSNorm, "__call__", wrong)
    assert not norm_is_right(LlamaRMSNorm)
