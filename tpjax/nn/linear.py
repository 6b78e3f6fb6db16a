"""Linear: whether it is column- or row-parallel follows from its axis names and the plan.

Weights are stored ``[out, in]``, as checkpoints hold them: column slices of the mathematics are row
slices of the file, nothing is transposed at load, and in bfloat16 on a CPU this layout is the
faster one (BENCHMARKS.md, "Weight layout").

B sequences, T tokens, R = B T rows, I input features, O output features.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tpjax.nn.param import value, weight
from tpjax.ops.matmul import matmul
from tpjax.parallel.dims import Dim
from tpjax.plan import Plan


class Linear(nnx.Module):
    """``y_BTO = x_BTI @ w_OI.T + b_O``.

    If the plan splits the output axis, each device computes its own columns. If it splits the input
    axis, each device holds a partial sum, in float32, and `Plan.sum` makes it whole; a bias is
    added after that, so that it counts once.
    """

    def __init__(self, out: Dim, in_: Dim, *, plan: Plan, dtype: str, bias: bool = False):
        self.out_axis, self.in_axis = out.axis, in_.axis
        self.plan = plan
        self.w = weight((out, in_), dtype)
        self.b = weight((out,), dtype) if bias else None

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        y_BTO = linear(self.plan, x_BTI, value(self.w), self.out_axis, self.in_axis)
        if self.b is None:
            return y_BTO.astype(x_BTI.dtype)
        b_O = value(self.b).astype(y_BTO.dtype)
        return (y_BTO + b_O[None, None, :]).astype(x_BTI.dtype)


def linear(
    plan: Plan, x_BTI: jax.Array, w_OI: jax.Array, out_axis: str | None, in_axis: str | None
) -> jax.Array:
    """The product in float32, summed over the devices that share the input axis."""
    B, T, _ = x_BTI.shape
    y_RO = product(plan, x_BTI, w_OI, out_axis, in_axis)
    y_RO = plan.sum(y_RO, plan.mesh_axes(in_axis), "batch", out_axis)
    return plan.reshape(y_RO, (B, T, y_RO.shape[1]), "batch", None, out_axis)


def product(
    plan: Plan, x_BTI: jax.Array, w_OI: jax.Array, out_axis: str | None, in_axis: str | None
) -> jax.Array:
    """``y_RO`` in float32, not yet summed."""
    partial = plan.mesh_axes(in_axis)
    alone = _alone_on_a_cpu(plan, x_BTI)
    if alone:
        x_BTI = jnp.concatenate([x_BTI, x_BTI], axis=1)
    B, T, features = x_BTI.shape
    x_RI = plan.reshape(x_BTI, (B * T, features), "batch", in_axis)
    y_RO = matmul(plan, x_RI, w_OI, out_axis, partial)
    if alone:
        twice = plan.spec("batch", None, out_axis, partial=partial)
        y_RO = jnp.reshape(y_RO, (B, T, y_RO.shape[1]), out_sharding=twice)[:, 0]
    return y_RO


def _alone_on_a_cpu(plan: Plan, x_BTI: jax.Array) -> bool:
    """Whether each device would multiply a single row in 16 bits: XLA's fast kernels on a CPU
    refuse one row, and what it does instead copies every weight to float32 on every call
    (BENCHMARKS.md, "bfloat16 on a CPU")."""
    rows = x_BTI.shape[0] // plan.shards("batch") * x_BTI.shape[1]
    return plan.platform == "cpu" and rows == 1 and x_BTI.dtype != jnp.float32
