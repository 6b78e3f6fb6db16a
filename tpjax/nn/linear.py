"""Linear: whether it is column- or row-parallel follows from its axis names and the plan.

Weights are stored ``[out, in]``, as checkpoints hold them: column slices of the mathematics are row
slices of the file, nothing is transposed at load, and in bfloat16 on a CPU this layout is the
faster one (BENCHMARKS.md, "Weight layout").

B sequences, T tokens, R = B T rows, I input features, O output features.
"""

import jax
from flax import nnx

from tpjax.nn.param import value, weight
from tpjax.ops.matmul import matmul
from tpjax.plan import Plan


class Linear(nnx.Module):
    """``y_BTO = x_BTI @ w_OI.T + b_O``, with ``out`` and ``in_`` given as (logical axis, size).

    If the plan splits the output axis, each device computes its own columns. If it splits the input
    axis, each device holds a partial sum, in float32, and `Plan.sum` makes it whole; a bias is
    added after that, so that it counts once.
    """

    def __init__(
        self,
        out: tuple[str | None, int],
        in_: tuple[str | None, int],
        *,
        plan: Plan,
        dtype: str,
        bias: bool = False,
    ):
        (self.out_axis, out_size), (self.in_axis, in_size) = out, in_
        self.plan = plan
        self.w = weight((out_size, in_size), (self.out_axis, self.in_axis), dtype)
        self.b = weight((out_size,), (self.out_axis,), dtype) if bias else None

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        y_BTO = linear(self.plan, x_BTI, value(self.w), self.out_axis, self.in_axis)
        if self.b is None:
            return y_BTO.astype(x_BTI.dtype)
        b_O = value(self.b).astype(y_BTO.dtype)
        return (y_BTO + b_O[None, None, :]).astype(x_BTI.dtype)


def linear(
    plan: Plan,
    x_BTI: jax.Array,
    w_OI: jax.Array,
    out_axis: str | None,
    in_axis: str | None,
) -> jax.Array:
    """The product in float32, summed over the devices that share the input axis."""
    B, T, features = x_BTI.shape
    x_RI = plan.reshape(x_BTI, (B * T, features), "batch", in_axis)
    partial = plan.mesh_axes(in_axis)
    y_RO = matmul(x_RI, w_OI, plan.spec("batch", out_axis, partial=partial), plan.platform)
    y_RO = plan.sum(y_RO, partial, "batch", out_axis)[: B * T]
    return plan.reshape(y_RO, (B, T, y_RO.shape[1]), "batch", None, out_axis)
