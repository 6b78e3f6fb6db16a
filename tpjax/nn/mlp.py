"""The MLP. B sequences, T tokens, D embed, F mlp."""

import functools

import jax
from flax import nnx

from tpjax.config import ModelConfig
from tpjax.nn.linear import Linear
from tpjax.nn.norm import Normed
from tpjax.plan import Plan

ACTS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """``down(act(gate(x)) * up(x))`` or, without a gate, ``down(act(up(x)))``: gate and up by
    column, down by row, one sum."""

    def __init__(self, config: ModelConfig, plan: Plan, width: int | None = None):
        linear = functools.partial(Linear, plan=plan, config=config, bias=config.mlp_bias)
        F, D = plan.dim("mlp", width or config.mlp), plan.dim("embed", config.embed)
        self.act = config.act
        self.gate = linear(F, D) if config.gated else None
        self.up = linear(F, D)
        self.down = linear(D, F)

    def __call__(self, x_BTD: jax.Array | Normed, onto_BTD: jax.Array | None = None) -> jax.Array:
        h_BTF = self.hidden(x_BTD)
        with jax.named_scope("down"):
            return self.down(h_BTF, onto_BTD)

    def hidden(self, x_BTD: jax.Array | Normed) -> jax.Array:
        """``h_BTF``, what goes into `down`."""
        act = ACTS[self.act]
        with jax.named_scope("up"):
            up_BTF = self.up(x_BTD)
        if self.gate is None:
            return act(up_BTF)
        with jax.named_scope("gate"):
            gate_BTF = self.gate(x_BTD)
        return act(gate_BTF) * up_BTF
