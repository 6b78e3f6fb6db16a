"""Attention over the cache: write the new keys and values, then attend. Islands, no collectives.

B sequences, D replicas, T new tokens, S cache positions, N query heads, K key/value heads, H head
dim.
"""

import jax
import jax.numpy as jnp

from tpjax import native
from tpjax.buckets import BLOCK, at_a_time
from tpjax.ops import attention_ref
from tpjax.ops.attention_ref import MASKED, Scores, dot, grouped, masked, ungrouped
from tpjax.plan import Plan

LayerCache = tuple[jax.Array, jax.Array]  # keys, values: [B, K, S, H]


def held_dtype(dtype: str, on_cpu: bool) -> str:
    """What a cache of ``dtype`` is held as. On a CPU halves are held as integers of the same bits:
    XLA computes in float32 there, and to write one position it would widen all of them."""
    return "uint16" if on_cpu and jnp.dtype(dtype).itemsize == 2 else dtype


def as_dtype(x: jax.Array, dtype) -> jax.Array:
    """A cast, or the same bits where one of the two is `held_dtype`'s integers."""
    if x.dtype != dtype and jnp.uint16 in (x.dtype, jnp.dtype(dtype)):
        return jax.lax.bitcast_convert_type(x, dtype)
    return x.astype(dtype)


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
    """``cache`` with each replica's row of ``one``, of as many positions or less, in its row
    ``slot``; a negative slot is none."""
    held = plan.spec("batch", "kv_heads", None, None)

    def local(cache_BKSH, one_1KSH, slot_1):
        slot = jnp.maximum(slot_1[0], 0)
        zero = slot * 0
        old = jax.lax.dynamic_slice(cache_BKSH, (slot, zero, zero, zero), one_1KSH.shape)
        new = jnp.where(slot_1[0] < 0, old, one_1KSH)
        return jax.lax.dynamic_update_slice(cache_BKSH, new, (slot, zero, zero, zero))

    return jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(held, held, plan.spec("batch")),
        out_specs=held,
        check_vma=False,
    )(cache_BKSH, one_DKSH, slot_D)


def attend_by_blocks(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    position_BT: jax.Array,
    scores: Scores,
    blocks: int | jax.Array,
) -> jax.Array:
    """`attention_ref.attend` over the first ``blocks`` blocks of positions, one after the other, so
    that scores of one block exist at a time: the maximum, the sum and the result so far are scaled
    when a block raises the maximum (the online softmax of FlashAttention, arXiv 2205.14135)."""
    q_BKRH = grouped(q_BTNH, k_BKSH.shape[1])
    B, K, R, _ = q_BKRH.shape

    def block(n, state):
        top_BKR, sum_BKR, o_BKRH = state
        first = jnp.asarray(n, jnp.int32) * BLOCK
        k, v = (
            as_dtype(jax.lax.dynamic_slice_in_dim(held, first, BLOCK, axis=2), q_BTNH.dtype)
            for held in (k_BKSH, v_BKSH)
        )
        score = masked(q_BKRH, k, position_BT, first, scores)
        new_BKR = jnp.maximum(top_BKR, jnp.max(score, axis=-1))
        share = jnp.exp(score - new_BKR[..., None])
        less_BKR = jnp.exp(top_BKR - new_BKR)
        out = dot("BKRS,BKSH->BKRH", share.astype(v.dtype), v)
        sum_BKR = sum_BKR * less_BKR + jnp.sum(share, axis=-1)
        return new_BKR, sum_BKR, o_BKRH * less_BKR[..., None] + out

    # Zeros that depend on the queries: XLA would make those of all layers before the first one.
    nothing = q_BKRH.astype(jnp.float32) * 0.0
    start = (jnp.full((B, K, R), MASKED), jnp.zeros((B, K, R)), nothing)
    _, sum_BKR, o_BKRH = jax.lax.fori_loop(0, blocks, block, start)
    o_BKRH = (o_BKRH / sum_BKR[..., None]).astype(q_BTNH.dtype)
    return ungrouped(o_BKRH, q_BTNH.shape[1])


def attend(
    on_cpu: bool, q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array, scores: Scores
) -> jax.Array:
    """Attention over a long cache by blocks: on a CPU those that are filled, which the loop can ask
    for; elsewhere all, for the length of a loop is then known to the host. One new token on a GPU
    has few scores and takes them at once."""
    S = k.shape[2]
    if at_a_time(S) == S or (q.shape[1] == 1 and not on_cpu):
        k, v = as_dtype(k, q.dtype), as_dtype(v, q.dtype)
        return attention_ref.attend(q, k, v, position, scores)
    blocks = jnp.max(position) // BLOCK + 1 if on_cpu else S // BLOCK
    return attend_by_blocks(q, k, v, position, scores, blocks)


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

    on_cpu = plan.platform == "cpu"

    def local(q, k, v, keys, values, position):
        keys = write(keys, as_dtype(k, keys.dtype), position[:, 0])
        values = write(values, as_dtype(v, values.dtype), position[:, 0])
        if on_cpu and native.attends(q.dtype):
            devices = plan.mesh.devices.size
            out = native.attend(q, keys, values, position[:, 0], devices, *scores)
        else:
            out = attend(on_cpu, q, keys, values, position, scores)
        return out, keys, values

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
