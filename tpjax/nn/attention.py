"""Grouped-query self-attention. B sequences, T tokens, D embed, N query heads, K key/value heads,
H head dim; N and K with padding."""

import functools

import jax
from flax import nnx

from tpjax.config import ModelConfig
from tpjax.nn.linear import Linear
from tpjax.nn.norm import Normed, norm
from tpjax.nn.rope import CosSin, rotate
from tpjax.ops.attention import LayerCache, cached_attention
from tpjax.ops.attention_ref import Scores
from tpjax.parallel.dims import head_dim
from tpjax.plan import Plan


class Attention(nnx.Module):
    """Queries, keys and values by column, output by row: one sum over the devices."""

    def __init__(self, config: ModelConfig, plan: Plan, layer: int):
        heads, H = plan.heads(config), config.head_dim
        linear = functools.partial(Linear, plan=plan, config=config)
        D = plan.dim("embed", config.embed)
        N = head_dim("heads", heads.queries, config.heads, H)
        K = head_dim("kv_heads", heads.kv, config.kv_heads, H)
        self.plan, self.head_dim = plan, H
        self.scores = Scores(
            scale=config.attn_scale or float(H) ** -0.5,
            softcap=config.attn_softcap,
            window=config.window if config.is_local(layer) else None,
        )
        self.q = linear(N, D, bias=config.qkv_bias)
        self.k = linear(K, D, bias=config.qkv_bias)
        self.v = linear(K, D, bias=config.qkv_bias)
        self.o = linear(D, N, bias=config.o_bias)
        self.q_norm = norm(config, H) if config.qk_norm else None
        self.k_norm = norm(config, H) if config.qk_norm else None

    def __call__(
        self,
        x_BTD: jax.Array | Normed,
        rope: CosSin | None,
        cache: LayerCache,
        position_BT: jax.Array,
        onto_BTD: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """What it makes of ``x``, added to ``onto``, and the cache with the new tokens in it."""
        with jax.named_scope("q"):
            q_BTNH = self.split(self.q(x_BTD), "heads")
        with jax.named_scope("k"):
            k_BTKH = self.split(self.k(x_BTD), "kv_heads")
        with jax.named_scope("v"):
            v_BTKH = self.split(self.v(x_BTD), "kv_heads")
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if rope is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, rope), rotate(k_BTKH, rope)
        with jax.named_scope("cache"):
            o_BTNH, cache = cached_attention(
                self.plan, q_BTNH, k_BTKH, v_BTKH, cache, position_BT, self.scores
            )
        B, T, N, H = o_BTNH.shape
        with jax.named_scope("o"):
            o_BTF = self.plan.reshape(o_BTNH, (B, T, N * H), "batch", None, "heads")
            return self.o(o_BTF, onto_BTD), cache

    def split(self, x_BTF: jax.Array, axis: str) -> jax.Array:
        """Features into heads; every device keeps the heads it has."""
        B, T, F = x_BTF.shape
        shape = (B, T, F // self.head_dim, self.head_dim)
        return self.plan.reshape(x_BTF, shape, "batch", None, axis, None)
