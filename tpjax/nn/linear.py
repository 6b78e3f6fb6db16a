"""Linear: whether it is column- or row-parallel follows from its axis names and the plan.

Weights are stored ``[out, in]``, as checkpoints hold them: column slices of the mathematics are row
slices of the file, nothing is transposed at load, and in bfloat16 on a CPU this layout is the
faster one (BENCHMARKS.md, "Weight layout").

B sequences, T tokens, R = B T rows, I input features, O output features.
"""

import jax
from flax import nnx

from tpjax.config import ModelConfig
from tpjax.nn.norm import Normed, RMSNorm
from tpjax.nn.param import value, weight
from tpjax.ops.matmul import matmul, matvec
from tpjax.parallel.dims import Dim
from tpjax.plan import Plan


class Linear(nnx.Module):
    """``y_BTO = x_BTI @ w_OI.T + b_O``.

    If the plan splits the output axis, each device computes its own columns. If it splits the input
    axis, each device holds a partial sum, in float32, and `Plan.sum` makes it whole; a bias is
    added after that, so that it counts once.
    """

    def __init__(self, out: Dim, in_: Dim, *, plan: Plan, config: ModelConfig, bias: bool = False):
        self.out_axis, self.in_axis = out.axis, in_.axis
        self.plan = plan
        self.w = weight((out, in_), config.held)
        self.b = weight((out,), config.dtype) if bias else None

    def __call__(self, x_BTI: jax.Array | Normed, onto_BTO: jax.Array | None = None) -> jax.Array:
        """``onto``: what the product is added to, and whose dtype the result has."""
        w_OI = value(self.w)
        y_BTO = linear(self.plan, x_BTI, w_OI, self.out_axis, self.in_axis, onto_BTO)
        if self.b is not None:
            y_BTO = y_BTO + value(self.b).astype(y_BTO.dtype)[None, None, :]
        return y_BTO.astype(x_BTI.dtype if onto_BTO is None else onto_BTO.dtype)


def linear(
    plan: Plan,
    x_BTI: jax.Array | Normed,
    w_OI: jax.Array,
    out_axis: str | None,
    in_axis: str | None,
    onto_BTO: jax.Array | None = None,
) -> jax.Array:
    """The product in float32, summed over the devices that share the input axis, with ``onto``."""
    B, T, _ = x_BTI.shape
    onto_RO = None
    if onto_BTO is not None:
        onto_RO = plan.reshape(onto_BTO, (B * T, onto_BTO.shape[2]), "batch", out_axis)
    if _in_one_kernel(plan, x_BTI):
        y_RO, onto_RO = _product_of_one(plan, x_BTI, w_OI, out_axis, in_axis, onto_RO), None
    else:
        y_RO = product(plan, x_BTI, w_OI, out_axis, in_axis)
    y_RO = plan.sum(y_RO, plan.mesh_axes(in_axis), "batch", out_axis, onto=onto_RO)
    return plan.reshape(y_RO, (B, T, y_RO.shape[1]), "batch", None, out_axis)


def product(
    plan: Plan,
    x_BTI: jax.Array | Normed,
    w_OI: jax.Array,
    out_axis: str | None,
    in_axis: str | None,
) -> jax.Array:
    """``y_RO`` in float32, not yet summed."""
    if isinstance(x_BTI, Normed):
        x_BTI = x_BTI.value
    B, T, features = x_BTI.shape
    x_RI = plan.reshape(x_BTI, (B * T, features), "batch", in_axis)
    return matmul(plan, x_RI, w_OI, out_axis, in_axis)


def alone(plan: Plan, x_BTI: jax.Array | Normed) -> bool:
    """Whether each device multiplies a single row."""
    return x_BTI.shape[0] // plan.shards("batch") * x_BTI.shape[1] == 1


def _in_one_kernel(plan: Plan, x_BTI: jax.Array | Normed) -> bool:
    """Whether a product is written as GPUs like it for a single row (`matvec`)."""
    return plan.platform == "gpu" and alone(plan, x_BTI)


def _product_of_one(plan: Plan, x_BTI, w_OI, out_axis, in_axis, onto_RO) -> jax.Array:
    """`product` of one row on each device, with ``onto`` in it, and the norm where it can be."""
    norm = None
    if isinstance(x_BTI, Normed):
        if isinstance(x_BTI.norm, RMSNorm):
            x_BTI, norm = x_BTI.x_BTD, x_BTI.norm.inside()
        else:
            x_BTI = x_BTI.value
    x_RI = plan.reshape(x_BTI, (x_BTI.shape[0], x_BTI.shape[2]), "batch", in_axis)
    return matvec(plan, x_RI, w_OI, out_axis, in_axis, norm, onto_RO)
