"""Mixture of experts. B sequences, T tokens, R = B T rows, D embed, E experts, F expert width."""

import jax
import jax.numpy as jnp
from flax import nnx

from tpjax.config import ModelConfig
from tpjax.nn.linear import Linear, product
from tpjax.nn.mlp import ACTS, MLP
from tpjax.nn.norm import Normed
from tpjax.nn.param import value, weight
from tpjax.ops.experts import Experts, mixture
from tpjax.parallel.dims import Dim
from tpjax.plan import Plan


class MoE(nnx.Module):
    """The chosen experts' outputs by their shares and, where there is one, the shared expert's by
    its gate; all in one sum over the devices, if they are split alike."""

    def __init__(self, config: ModelConfig, plan: Plan):
        moe, dtype = config.moe, config.held
        assert moe is not None
        self.config, self.plan = config, plan
        E, F = plan.dim("experts", moe.experts), plan.dim("expert_mlp", moe.mlp)
        D = plan.dim("embed", config.embed)
        self.router = weight((Dim(None, moe.experts, moe.experts), D), dtype)
        self.gate = weight((E, F, D), dtype)
        self.up = weight((E, F, D), dtype)
        self.down = weight((E, D, F), dtype)
        if moe.shared_mlp:
            self.shared = MLP(config, plan, moe.shared_mlp)
            self.shared_gate = Linear(Dim(None, 1, 1), D, plan=plan, config=config)

    def __call__(self, x_BTD: jax.Array | Normed, onto_BTD: jax.Array | None = None) -> jax.Array:
        plan, moe = self.plan, self.config.moe
        assert moe is not None
        if isinstance(x_BTD, Normed):
            x_BTD = x_BTD.value
        B, T, D = x_BTD.shape
        onto_RD = None
        if onto_BTD is not None:
            onto_RD = plan.reshape(onto_BTD, (B * T, D), "batch", "embed")
        partial = plan.mesh_axes("experts") + plan.mesh_axes("expert_mlp")
        weights = Experts(*map(value, (self.router, self.gate, self.up, self.down)))
        x_RD = plan.reshape(x_BTD, (B * T, D), "batch", "embed")
        act = ACTS[self.config.act]
        y_RD = mixture(plan, x_RD, weights, moe, act, partial)
        if moe.shared_mlp:
            share_BT1 = jax.nn.sigmoid(self.shared_gate(x_BTD).astype(jnp.float32))
            h_BTF = self.shared.hidden(x_BTD) * share_BT1.astype(x_BTD.dtype)
            shared_RD = product(plan, h_BTF, value(self.shared.down.w), "embed", "mlp")
            if plan.layout.together:
                y_RD = y_RD + shared_RD
            else:  # a plan of the user's splits one of them only
                shared_RD = plan.sum(
                    shared_RD, plan.mesh_axes("mlp"), "batch", "embed", onto=onto_RD
                )
                onto_RD = shared_RD
        y_RD = plan.sum(y_RD, partial, "batch", "embed", onto=onto_RD)
        dtype = x_BTD.dtype if onto_BTD is None else onto_BTD.dtype
        return plan.reshape(y_RD, (B, T, D), "batch", None, "embed").astype(dtype)
