"""Gated MLP. B sequences, T tokens, D embed, F mlp."""

import functools

import jax
from flax import nnx

from tpjax.config import ModelConfig
from tpjax.nn.linear import Linear
from tpjax.plan import Plan


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``: gate and up by column, down by row, one sum."""

    def __init__(self, config: ModelConfig, plan: Plan):
        linear = functools.partial(Linear, plan=plan, dtype=config.dtype, bias=config.mlp_bias)
        self.gate = linear(("mlp", config.mlp), ("embed", config.embed))
        self.up = linear(("mlp", config.mlp), ("embed", config.embed))
        self.down = linear(("embed", config.embed), ("mlp", config.mlp))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))
