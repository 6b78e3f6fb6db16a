"""Islands around the embedding table. B sequences, T tokens, D embed, V vocabulary."""

import jax
import jax.numpy as jnp

from tpjax.plan import Plan


def lookup(plan: Plan, table_VD: jax.Array, token_BT: jax.Array) -> jax.Array:
    """``x_BTD``: every device looks up the tokens it holds and the sum over devices is exact,
    because all but one add zero. Indexing a split table outside an island would gather all of it.

    One all-reduce of B x T x D elements. Not `Plan.sum`: nothing is rounded here, so it needs no
    float32 and no choice of algorithm.
    """
    axes = plan.mesh_axes("vocab")
    two_bytes_on_cpu = plan.platform == "cpu" and table_VD.dtype.itemsize == 2
    rows = _rows_by_bits if two_bytes_on_cpu else lambda table, row: table[row]

    def local(table, token):
        row = token - jax.lax.axis_index(axes) * table.shape[0] if axes else token
        mine = (row >= 0) & (row < table.shape[0])
        found = rows(table, jnp.where(mine, row, 0))
        found = jnp.where(mine[..., None], found, jnp.zeros((), table.dtype))
        return jax.lax.psum(found, axes) if axes else found

    return jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(plan.spec("vocab", "embed"), plan.spec("batch", None)),
        out_specs=plan.spec("batch", None, "embed"),
    )(table_VD, token_BT)


def _rows_by_bits(table: jax.Array, row: jax.Array) -> jax.Array:
    """``table[row]`` of a two-byte type, indexed as integers: XLA on a CPU would convert the whole
    table to float32 first."""
    # The barrier makes the cast depend on the loop, so that it is fused and not done ahead of it.
    table, row = jax.lax.optimization_barrier((table, row))
    bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
    return jax.lax.bitcast_convert_type(bits[row], table.dtype)


def last_token(x_BTD: jax.Array, count_B: jax.Array) -> jax.Array:
    """``x_B1D``: for each sequence the vector of its last real token, the ``count``-th."""
    if x_BTD.shape[1] == 1:
        return x_BTD
    is_last_BT = jnp.arange(x_BTD.shape[1])[None, :] == count_B[:, None] - 1
    return jnp.sum(x_BTD, axis=1, keepdims=True, where=is_last_BT[..., None])
