"""The products every Linear uses.

R rows (tokens), I input features, O output features.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tpjax import native
from tpjax.ops import tiles
from tpjax.plan import Plan


class RootMeanSquare(NamedTuple):
    """``x / rms(x) * scale``: a norm that a product of one row can do on the way."""

    scale_I: jax.Array  # float32
    eps: float


def matmul(
    plan: Plan, x_RI: jax.Array, w_OI: jax.Array, out_axis: str | None, in_axis: str | None
) -> jax.Array:
    """``x @ w.T`` in float32, not yet summed over the devices that share the input axis. Float32
    operands are multiplied at full precision (a GPU would otherwise round them to TF32); so is,
    on a CPU, float32 with a matrix of 16 bits.

    Both operands have two dimensions: with a third, XLA on a CPU transposes the weight first.
    """
    partial = plan.mesh_axes(in_axis)
    weights = w_OI.size // plan.shards(out_axis) // plan.shards(in_axis)
    rows = x_RI.shape[0] // plan.shards("batch")
    on_cpu = plan.platform == "cpu"
    if on_cpu and (product := product_on_cpu(plan, rows, x_RI.dtype, w_OI.dtype, weights)):
        return jax.shard_map(
            lambda x_RI, w_OI: product(x_RI, w_OI[None], 0),
            mesh=plan.mesh,
            in_specs=(plan.spec("batch", in_axis), plan.spec(out_axis, in_axis)),
            out_specs=plan.spec("batch", out_axis, partial=partial),
            check_vma=False,
        )(x_RI, w_OI)
    return tiles.dot(x_RI, w_OI, out_sharding=plan.spec("batch", out_axis, partial=partial))


def product_on_cpu(
    plan: Plan, rows: int, dtype, held, weights: int
) -> Callable[[jax.Array, jax.Array, int | jax.Array], jax.Array] | None:
    """What each device of a CPU better does than XLA's product, if there is something: ``x_RI``
    with one matrix of ``w_EOI``. Our own kernel, if it could be built; if not, a matrix of 16 bits
    is widened a tile at a time for one row, or for rows of float32 (BENCHMARKS.md, "Products on a
    CPU")."""
    if native.wins(rows, dtype, held, weights):
        return functools.partial(native.product, devices=plan.mesh.devices.size)
    if held != jnp.float32 and (rows == 1 or dtype == jnp.float32):
        return tiles.product
    return None


def matvec(
    plan: Plan,
    x_RI: jax.Array,
    w_OI: jax.Array,
    out_axis: str | None,
    in_axis: str | None,
    norm: RootMeanSquare | None = None,
    onto_RO: jax.Array | None = None,
) -> jax.Array:
    """`matmul` where each device has one row, for GPUs: a sum of products for every output, which
    XLA makes one kernel that reads each weight once, together with products of the same shape and
    input. What comes before and after would be kernels of their own, so it is in the sum as well.

    ``norm``: ``x`` is normalised first, which needs all of it on each device. Every output divides
    by the root mean square it has summed on the way. ``onto``: what the product is added to, by the
    first device of those whose sums are to be summed.
    """
    partial = plan.mesh_axes(in_axis)

    def local(x_RI, w_OI, scale_I, onto_RO):
        x_I, w_OI = x_RI[0].astype(jnp.float32), w_OI.astype(jnp.float32)
        onto_O = None if onto_RO is None else onto_RO[0].astype(jnp.float32)
        if norm is None:
            return jnp.sum(with_first(x_I[None] * w_OI, onto_O), axis=1)[None]
        term_OI = (x_I * scale_I)[None] * w_OI
        square_OI = jnp.broadcast_to((x_I * x_I)[None], term_OI.shape)
        zero = jnp.float32(0)
        add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
        sum_O, square_O = jax.lax.reduce((term_OI, square_OI), (zero, zero), add, (1,))
        y_O = sum_O * jax.lax.rsqrt(square_O / x_I.shape[0] + norm.eps)
        return (y_O if onto_O is None else y_O + onto_O)[None]

    def with_first(term_OI, onto_O):
        if onto_O is None:
            return term_OI
        at_OI = jax.lax.broadcasted_iota(jnp.int32, term_OI.shape, 1)
        first = jnp.where(jax.lax.axis_index(partial) == 0, 0, -1) if partial else 0
        return term_OI + jnp.where(at_OI == first, onto_O[:, None], 0)

    return jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(
            plan.spec("batch", in_axis),
            plan.spec(out_axis, in_axis),
            plan.spec(None),
            plan.spec("batch", out_axis),
        ),
        out_specs=plan.spec("batch", out_axis, partial=partial),
        check_vma=False,
    )(x_RI, w_OI, None if norm is None else norm.scale_I, onto_RO)
