"""The decoder: embedding, blocks, final norm, head. Written once, with global shapes.

B sequences, T tokens, D embed, V vocabulary (padded).
"""

import jax
from flax import nnx

from tpjax.cache import KVCache
from tpjax.config import ModelConfig
from tpjax.nn.attention import Attention
from tpjax.nn.embed import Embed
from tpjax.nn.linear import linear
from tpjax.nn.mlp import MLP
from tpjax.nn.norm import RMSNorm
from tpjax.nn.param import value, weight
from tpjax.nn.rope import cos_sin
from tpjax.plan import Plan


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, plan: Plan):
        self.attn_norm = RMSNorm(config.embed, eps=config.norm_eps, dtype=config.dtype)
        self.attn = Attention(config, plan)
        self.mlp_norm = RMSNorm(config.embed, eps=config.norm_eps, dtype=config.dtype)
        self.mlp = MLP(config, plan)

    def __call__(self, x_BTD, rope, cache, position_BT):
        attended, cache = self.attn(self.attn_norm(x_BTD), rope, cache, position_BT)
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


class Decoder(nnx.Module):
    """A causal language model over a cache. Layers are a Python loop over separate weights: stacked
    weights under a scan are copied before every product, on GPUs as well as on CPUs."""

    def __init__(self, config: ModelConfig, plan: Plan):
        self.config, self.plan = config, plan
        self.embed = Embed(config.vocab, config.embed, plan=plan, dtype=config.dtype)
        self.blocks = nnx.List([Block(config, plan) for _ in range(config.layers)])
        self.norm = RMSNorm(config.embed, eps=config.norm_eps, dtype=config.dtype)
        if not config.tie_embeddings:
            shape = (plan.padded("vocab", config.vocab), config.embed)
            self.head = weight(shape, ("vocab", "embed"), config.dtype)

    def __call__(
        self,
        token_BT: jax.Array,
        position_BT: jax.Array,
        cache: KVCache,
        taps: list[jax.Array] | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """The residual stream ``x_BTD`` after the final norm, and the cache with T more tokens.

        ``taps``, if given, receives the embedding's and every block's output.
        """
        config = self.config
        x_BTD = self.embed(token_BT)
        rope = cos_sin(config.rope, config.head_dim, position_BT, x_BTD.dtype)
        layers = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            if taps is not None:
                taps.append(x_BTD)
            x_BTD, layer = block(x_BTD, rope, layer, position_BT)
            layers.append(layer)
        if taps is not None:
            taps.append(x_BTD)
        return self.norm(x_BTD), KVCache(tuple(layers))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 ``[B, T, V]``, split over the vocabulary; padded entries are meaningless."""
        table = self.embed.w if self.config.tie_embeddings else self.head
        return linear(self.plan, x_BTD, value(table), "vocab", "embed")
