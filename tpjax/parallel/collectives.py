"""How partial sums become sums. The model never says; the plan picks one of these by name.

Each takes ``y`` of spec ``unsummed``, which says ``unreduced`` over the mesh axes ``partial``, and
returns the sum, with spec ``spec``. Cost per device for S bytes over n devices: about
2 S (n - 1) / n either way.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tpjax.parallel.rules import MeshAxes


def added_once(
    y: jax.Array, onto: jax.Array, partial: MeshAxes, unsummed: PartitionSpec, spec: PartitionSpec
) -> jax.Array:
    """``y``, not yet summed, with ``onto``, which all devices have, added by the first of them."""

    def local(y_part, onto):
        first = jax.lax.axis_index(partial) == 0
        return y_part + jnp.where(first, onto, 0).astype(y_part.dtype)

    return jax.shard_map(local, in_specs=(unsummed, spec), out_specs=unsummed, check_vma=False)(
        y, onto
    )


def xla(y: jax.Array, partial: MeshAxes, unsummed: PartitionSpec, spec: PartitionSpec) -> jax.Array:
    """One all-reduce, which XLA may implement as it likes."""
    return jax.reshard(y, spec)


def reduce_scatter_all_gather(
    y: jax.Array, partial: MeshAxes, unsummed: PartitionSpec, spec: PartitionSpec
) -> jax.Array:
    """A reduce-scatter over the last axis, then an all-gather: the same bytes in two halves, which
    is where sequence parallelism and overlap will later put work in between."""

    def local(y_part):
        last, size = y_part.ndim - 1, y_part.shape[-1]
        padding = [(0, 0)] * last + [(0, -size % jax.lax.axis_size(partial))]
        y_part = jnp.pad(y_part, padding)  # nothing, where the devices divide it
        mine = jax.lax.psum_scatter(y_part, partial, scatter_dimension=last, tiled=True)
        whole = jax.lax.all_gather(mine, partial, axis=last, tiled=True)
        return jax.lax.slice_in_dim(whole, 0, size, axis=last)

    return jax.shard_map(local, in_specs=unsummed, out_specs=spec, check_vma=False)(y)


def left_out(
    y: jax.Array, partial: MeshAxes, unsummed: PartitionSpec, spec: PartitionSpec
) -> jax.Array:
    """Every device goes on with its own part. What that computes is wrong, but how long it takes is
    what a step takes without its sums; nobody but who measures that may have it."""
    return jax.shard_map(lambda part: part, in_specs=unsummed, out_specs=spec, check_vma=False)(y)


SUMS: dict[str, Callable[..., jax.Array]] = {"xla": xla, "rs_ag": reduce_scatter_all_gather}
