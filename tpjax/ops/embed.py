"""Islands around the embedding table. B sequences, T tokens, D embed, V vocabulary."""

import jax
import jax.numpy as jnp

from tpjax.plan import Plan


def lookup(plan: Plan, table_VD: jax.Array, token_BT: jax.Array) -> jax.Array:
    """``x_BTD``: every device looks up the tokens it holds and the sum over devices is exact,
    because all but one add zero. Indexing a split table outside an island would gather all of it.

    One all-reduce of B x T x D elements.
    """
    axes = plan.mesh_axes("vocab")

    def local(table, token):
        row = token - jax.lax.axis_index(axes) * table.shape[0] if axes else token
        mine = (row >= 0) & (row < table.shape[0])
        found = jnp.where(mine[..., None], table[jnp.where(mine, row, 0)], jnp.zeros((), table.dtype))
        return jax.lax.psum(found, axes) if axes else found

    return jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(plan.spec("vocab", "embed"), plan.spec("batch", None)),
        out_specs=plan.spec("batch", None, "embed"),
    )(table_VD, token_BT)


def last_token(x_BTD: jax.Array, count_B: jax.Array) -> jax.Array:
    """``x_B1D``: for each sequence the vector of its last real token, the ``count``-th."""
    if x_BTD.shape[1] == 1:
        return x_BTD
    is_last_BT = jnp.arange(x_BTD.shape[1])[None, :] == count_B[:, None] - 1
    return jnp.sum(x_BTD, axis=1, keepdims=True, where=is_last_BT[..., None])
