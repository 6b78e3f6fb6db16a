"""Attention over the cache: write the new keys and values, then attend. Islands, no collectives.

B sequences, D replicas, T new tokens, S cache positions, N query heads, K key/value heads, H head
dim.
"""

import jax
import jax.numpy as jnp

from tpjax.ops import attention_ref
from tpjax.ops.attention_ref import Scores
from tpjax.plan import Plan

LayerCache = tuple[jax.Array, jax.Array]  # keys, values: [B, K, S, H]


def write(cache_BKSH: jax.Array, new_BTKH: jax.Array, start_B: jax.Array) -> jax.Array:
    """The cache with T new positions from ``start`` on, in each sequence its own; in place when
    the cache is donated. One sequence is a plain slice update, several are one scatter."""
    new_BKTH = new_BTKH.transpose(0, 2, 1, 3)

    def one(cache_KSH, new_KTH, start):
        zero = start * 0
        return jax.lax.dynamic_update_slice(cache_KSH, new_KTH, (zero, start, zero))

    if new_BKTH.shape[0] == 1:
        return one(cache_BKSH[0], new_BKTH[0], start_B[0])[None]
    return jax.vmap(one)(cache_BKSH, new_BKTH, start_B)


def insert_row(plan: Plan, cache_BKSH: jax.Array, one_DKSH: jax.Array, slot_D: jax.Array):
    """``cache`` with each replica's row of ``one`` in its row ``slot``; a negative slot is none."""
    held = plan.spec("batch", "kv_heads", None, None)

    def local(cache_BKSH, one_1KSH, slot_1):
        slot = jnp.maximum(slot_1[0], 0)
        zero = slot * 0
        old = jax.lax.dynamic_slice_in_dim(cache_BKSH, slot, 1, axis=0)
        new = jnp.where(slot_1[0] < 0, old, one_1KSH)
        return jax.lax.dynamic_update_slice(cache_BKSH, new, (slot, zero, zero, zero))

    return jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(held, held, plan.spec("batch")),
        out_specs=held,
        check_vma=False,
    )(cache_BKSH, one_DKSH, slot_D)


def cached_attention(
    plan: Plan,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cache: LayerCache,
    position_BT: jax.Array,
    scores: Scores,
) -> tuple[jax.Array, LayerCache]:
    """``o_BTNH`` and the cache with the new tokens in it. Positions of a sequence are consecutive.

    Every device works on its own query heads and the key/value heads they share, equally many of
    each of these (see `tpjax.parallel.dims.place_heads`), so grouping by reshape holds locally too.
    """

    def local(q, k, v, keys, values, position):
        keys = write(keys, k.astype(keys.dtype), position[:, 0])
        values = write(values, v.astype(values.dtype), position[:, 0])
        return attention_ref.attend(q, keys, values, position, scores), keys, values

    new = plan.spec("batch", None, "kv_heads", None)
    held = plan.spec("batch", "kv_heads", None, None)
    out = plan.spec("batch", None, "heads", None)
    o_BTNH, keys, values = jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(out, new, new, held, held, plan.spec("batch", None)),
        out_specs=(out, held, held),
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH, *cache, position_BT)
    return o_BTNH, (keys, values)
