"""What one family does and another does not cannot be forgotten or mistaken: each of these wrong
programs runs to its end, and its logits are not transformers'. Experts: tests/test_moe_mutations.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from tests.families import Tiny
from tests.reference import TOLERANCE, load, prompt
from tests.wrong import (
    Mutation,
    every_second,
    facts,
    in_blocks,
    in_names,
    norm_is_right,
    padding_of_ones,
    rewired,
    rope,
    row_bias_on_every_device,
    scoring,
    started_from,
)
from tpjax.checkpoint.tensors import Tensors
from tpjax.nn import attention, decoder
from tpjax.nn.attention import Attention
from tpjax.nn.decoder import Decoder
from tpjax.nn.norm import LayerNorm, RMSNorm
from tpjax.nn.param import value
from tpjax.parallel import layout as plans
from tpjax.parallel.dims import Heads
from tpjax.plan import Plan

THREE = {"tensor": 3}  # divides neither heads nor vocabulary
FIVE = {"tensor": 5}  # nor the MLP


def without_qk_norms(block):
    block.attn.q_norm = block.attn.k_norm = None


def qk_norms_after_rope(patch):
    call, rotate = Attention.__call__, attention.rotate

    def wrong(self, *args):
        norms = iter([self.q_norm, self.k_norm])
        self.q_norm = self.k_norm = None
        patch.setattr(attention, "rotate", lambda x, rope: next(norms)(rotate(x, rope)))
        return call(self, *args)

    patch.setattr(Attention, "__call__", wrong)


def without_qk_offset(block):
    block.attn.q_norm.offset = block.attn.k_norm.offset = 0.0


def softcap_after_the_mask(patch):
    """What is hidden then weighs as much as a score of minus the cap."""
    softmax = jax.nn.softmax
    patch.setattr(jax.nn, "softmax", lambda x, axis: softmax(jnp.tanh(x / 2.0) * 2.0, axis=axis))
    scoring(lambda scores: {"softcap": None})(patch)


def local_layers_shifted(config):
    return config.local_layers[1:] + config.local_layers[:1]


def local_rope_linear_too(config):
    return dataclasses.replace(config.rope_local, kind="linear", factor=4.0)


def the_last_part_rotated(patch):
    rotate = attention.rotate

    def wrong(x, rope):
        rest = x.shape[-1] - 2 * rope[0].shape[-1]
        return jnp.concatenate([x[..., :rest], rotate(x[..., rest:], rope)], axis=-1)

    patch.setattr(attention, "rotate", wrong)


def rope_of_each_chunk(patch):
    """Long is what is long so far, not the prompt that the chunk belongs to."""
    cos_sin = decoder.cos_sin
    wrong = lambda rope, dim, at, length, dtype: cos_sin(rope, dim, at, at[:, -1] + 1, dtype)  # noqa: E731
    patch.setattr(decoder, "cos_sin", wrong)


def parts_from_the_first_row(patch):
    """Of a fused tensor, every weight is the first of its rows."""
    init = Tensors.__init__

    def wrong(self, *args):
        init(self, *args)
        self._of = {key: (tensor, 0) for key, (tensor, _) in self._of.items()}

    patch.setattr(Tensors, "__init__", wrong)


def fused_rows_cut_like_one_weight(patch):
    """A device's share of a fused tensor is taken as if the tensor were one weight."""
    pieces = Tensors.pieces

    def wrong(self, spec, bounds):
        for tensor, stored, where in pieces(self, spec, bounds):
            rows = tensor.shape[0] // spec.stored[0]
            (begin, end), *rest = stored
            first = min(begin * rows, tensor.shape[0] - (end - begin))
            yield tensor, ((first, first + end - begin), *rest), where

    patch.setattr(Tensors, "pieces", wrong)


def without_final_norm(model):
    model.norm = lambda x: x


def layer_norm_without_mean(patch):
    mean = lambda self, x: RMSNorm.__call__(self, x) + value(self.b)[None, None]  # noqa: E731
    patch.setattr(LayerNorm, "offset", 0.0, raising=False)
    patch.setattr(LayerNorm, "__call__", mean)


def placing(change):
    """Heads are somewhere else."""
    place = plans.place_heads

    def wrong(heads, kv_heads, *mesh):
        right = place(heads, kv_heads, *mesh)
        return Heads(tuple(change(q, heads, kv_heads) for q in right.queries), right.kv)

    return lambda patch: patch.setattr(plans, "place_heads", wrong)


def vocabulary_padded_in_front(patch):
    dim = Plan.dim

    def wrong(self, axis, size):
        right = dim(self, axis, size)
        if axis != "vocab":
            return right
        return dataclasses.replace(right, order=(-1,) * (right.size - size) + (*range(size),))

    patch.setattr(Plan, "dim", wrong)


MUTATIONS = {
    # Gemma
    "norms_without_the_one": Mutation("gemma: grouped", facts(norm_offset=0.0)),
    "embedding_scale_forgotten": Mutation("gemma: grouped", facts(embed_scale=1.0)),
    "gelu_exact": Mutation("gemma: grouped", facts(act="gelu")),
    "norms_called_as_in_llama": Mutation(
        "gemma2: caps", in_names("gemma2", "mlp_norm.w", "post_attn_norm.w")
    ),
    "post_norms_dropped": Mutation(
        "gemma2: caps", in_blocks(lambda block: setattr(block, "place", "before"))
    ),
    "attn_softcap_dropped": Mutation("gemma2: tight caps, untied", facts(attn_softcap=None)),
    "softcap_after_the_mask": Mutation("gemma2: tight caps, untied", softcap_after_the_mask),
    "softcap_before_the_scale": Mutation(
        "gemma2: tight caps, untied", scoring(lambda s: {"softcap": s.softcap * s.scale})
    ),
    "final_softcap_dropped": Mutation("gemma2: caps", facts(final_softcap=None)),
    "query_pre_attn_scalar_ignored": Mutation("gemma2: caps", facts(attn_scale=None)),
    "local_layers_shifted": Mutation("gemma2: caps", facts(local_layers=local_layers_shifted)),
    "thetas_swapped": Mutation(
        "gemma3_text: grouped",
        facts(rope=lambda config: config.rope_local, rope_local=lambda config: config.rope),
    ),
    "local_theta_forgotten": Mutation("gemma3_text: grouped", facts(rope_local=None)),
    "local_rope_linear_too": Mutation(
        "gemma3_text: linear on full layers", facts(rope_local=local_rope_linear_too)
    ),
    "qk_norms_without_the_one": Mutation("gemma3_text: grouped", in_blocks(without_qk_offset)),
    # Mistral, Qwen
    "window_ignored": Mutation("mistral: window", facts(window=None)),
    "window_one_longer": Mutation("mistral: window", facts(window=lambda c: c.window + 1)),
    "window_one_shorter": Mutation("mistral: window", facts(window=lambda c: c.window - 1)),
    "window_in_every_layer": Mutation(
        "qwen2: window from layer 1", facts(local_layers=(True, True))
    ),
    "qkv_biases_dropped": Mutation(
        "qwen2: grouped", in_blocks(lambda block: setattr(block.attn.k, "b", None))
    ),
    "yarn_scale_dropped": Mutation("qwen2: tied, yarn", rope(scale=1.0)),
    "yarn_not_truncated": Mutation("qwen2: tied, yarn", rope(truncate=False)),
    "qk_norms_dropped": Mutation("qwen3: grouped", in_blocks(without_qk_norms)),
    "qk_norms_after_rope": Mutation("qwen3: grouped", qk_norms_after_rope),
    # Phi-3, Llama
    "k_q_v": Mutation("phi3: longrope", in_names("phi3", "attn.q.w", "attn.k.w")),
    "q_v_k": Mutation("phi3: longrope", in_names("phi3", "attn.k.w", "attn.v.w")),
    "up_gate": Mutation("phi3: longrope", in_names("phi3", "mlp.gate.w", "mlp.up.w")),
    "parts_from_the_first_row": Mutation("phi3: longrope", parts_from_the_first_row),
    "fused_rows_cut_like_one_weight": Mutation("phi3: all kv", fused_rows_cut_like_one_weight),
    "longrope_always_short": Mutation(
        "phi3: longrope", rope(long_factor=lambda rope: rope.short_factor)
    ),
    "longrope_always_long": Mutation(
        "phi3: longrope", rope(short_factor=lambda rope: rope.long_factor), tokens=32
    ),
    "longrope_scale_dropped": Mutation("phi3: longrope", rope(scale=1.0)),
    "longrope_of_each_chunk": Mutation("phi3: longrope", rope_of_each_chunk),
    "the_last_part_rotated": Mutation("phi3: partly rotated, window", the_last_part_rotated),
    "whole_heads_rotated": Mutation("phi3: partly rotated, window", rope(rotated=1.0)),
    "dynamic_rope_not_growing": Mutation("llama: one kv head, dynamic", rope(kind="default")),
    "dynamic_rope_grows_early": Mutation(
        "llama: one kv head, dynamic", rope(original_max_position=31), tokens=32
    ),
    "dynamic_rope_of_each_chunk": Mutation("llama: one kv head, dynamic", rope_of_each_chunk),
    # OPT
    "positions_from_row_0": Mutation("opt: before", facts(position_offset=0)),
    "final_norm_dropped": Mutation("opt: before", rewired(without_final_norm)),
    "gelu_for_relu": Mutation("opt: before", facts(act="gelu")),
    "layer_norm_without_mean": Mutation("opt: before", layer_norm_without_mean),
    "row_bias_on_every_device": Mutation("opt: before", row_bias_on_every_device),
    "gelu_tanh": Mutation("opt: untied, gelu, no biases", facts(act="gelu_tanh")),
    "normalised_before": Mutation("opt: after, projected", facts(norm_place="before")),
    # Any degree
    "query_heads_tiled": Mutation(
        "qwen3: grouped", placing(lambda q, n, k: q % (n // k) * k + q // (n // k)), THREE
    ),
    # Single places beside real keys: where whole groups are padding, their values are zero too.
    "padding_repeats_a_head": Mutation(
        "qwen3: tied, one kv head", placing(lambda q, n, k: max(q, 0)), THREE
    ),
    "heads_padded_with_ones": Mutation("qwen3: tied, one kv head", padding_of_ones("heads"), THREE),
    "mlp_padded_with_ones": Mutation("qwen3: grouped", padding_of_ones("mlp"), FIVE),
    "vocabulary_padded_in_front": Mutation("qwen3: grouped", vocabulary_padded_in_front, THREE),
}
RIGHT = started_from(MUTATIONS.values())


@pytest.mark.parametrize("mutation", every_second(RIGHT))
def test_unmutated(apart, xla_attention, mutation):
    """The programs these mutations start from agree."""
    assert apart(mutation) <= TOLERANCE


@pytest.mark.parametrize("mutation", every_second(MUTATIONS))
def test_mutation_is_caught(apart, xla_attention, monkeypatch, mutation):
    mutation.mutate(monkeypatch)
    assert apart(mutation) > TOLERANCE


def cast_before_the_weight(self, x):
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return (1 + value(self.w)[None, None]) * (x32 * scale).astype(x.dtype)


def test_norm_cast_is_caught(monkeypatch):
    """Gemma's norm is multiplied by one plus weight in float32; only 16 bits show it."""
    assert norm_is_right(GemmaRMSNorm, offset=1.0)
    monkeypatch.setattr(RMSNorm, "__call__", cast_before_the_weight)
    assert not norm_is_right(GemmaRMSNorm, offset=1.0)


def scale_not_rounded(self, token, position):
    x32 = self.embed(token).astype(jnp.float32)
    return x32 * jnp.float32(self.config.embed_scale)


def test_embedding_scale_cast_is_caught(tmp_path, monkeypatch):
    """The scale, no power of two here, is rounded to the dtype before it multiplies."""
    hf, ids = Tiny("GemmaConfig", {"hidden_size": 48}).make(tmp_path), prompt(32)
    with torch.no_grad():
        want = hf.to(torch.bfloat16).model.embed_tokens(torch.tensor(ids)).float().numpy()

    def equal() -> bool:
        llm = load(tmp_path, 1, dtype="bfloat16", max_model_len=64)
        return bool((llm.states(ids)[0] == want).all())

    assert equal()
    monkeypatch.setattr(Decoder, "start", scale_not_rounded)
    assert not equal()
