"""Grouped-query self-attention. B sequences, T tokens, D embed, N query heads, K key/value heads,
H head dim."""

import functools

import jax
from flax import nnx

from tpjax.config import ModelConfig
from tpjax.nn.linear import Linear
from tpjax.nn.rope import CosSin, rotate
from tpjax.ops.attention import LayerCache, cached_attention
from tpjax.plan import Plan


class Attention(nnx.Module):
    """Queries, keys and values by column, output by row: one sum over the devices."""

    def __init__(self, config: ModelConfig, plan: Plan):
        D, N, K, H = config.embed, config.heads, config.kv_heads, config.head_dim
        linear = functools.partial(Linear, plan=plan, dtype=config.dtype, bias=config.attn_bias)
        self.plan, self.head_dim, self.scale = plan, H, float(H) ** -0.5
        self.q = linear(("heads", N * H), ("embed", D))
        self.k = linear(("kv_heads", K * H), ("embed", D))
        self.v = linear(("kv_heads", K * H), ("embed", D))
        self.o = linear(("embed", D), ("heads", N * H))

    def __call__(
        self, x_BTD: jax.Array, rope: CosSin, cache: LayerCache, position_BT: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        q_BTNH = rotate(self.split(self.q(x_BTD), "heads"), rope)
        k_BTKH = rotate(self.split(self.k(x_BTD), "kv_heads"), rope)
        v_BTKH = self.split(self.v(x_BTD), "kv_heads")
        o_BTNH, cache = cached_attention(
            self.plan, q_BTNH, k_BTKH, v_BTKH, cache, position_BT, self.scale
        )
        B, T, N, H = o_BTNH.shape
        return self.o(self.plan.reshape(o_BTNH, (B, T, N * H), "batch", None, "heads")), cache

    def split(self, x_BTF: jax.Array, axis: str) -> jax.Array:
        """Features into heads; every device keeps the heads it has."""
        B, T, F = x_BTF.shape
        shape = (B, T, F // self.head_dim, self.head_dim)
        return self.plan.reshape(x_BTF, shape, "batch", None, axis, None)
