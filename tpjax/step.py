"""The pure steps; `executables` builds them ahead of time, one per bucket.

B sequences, T tokens, S cache positions, N tokens per dispatch, C packed columns.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tpjax import sampling
from tpjax.cache import KVCache
from tpjax.ops.attention import insert_row
from tpjax.ops.embed import last_token
from tpjax.ops.sample import Drawn, Rows, on_all, sample
from tpjax.params import MAX_LOGPROBS
from tpjax.weights import WeightTable

Leaves = tuple[jax.Array, ...]


def prefill(
    table: WeightTable,
    weights: Leaves,
    cache: KVCache,
    token_BT: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    length_B: jax.Array,
    packed_BC: jax.Array,
) -> tuple[KVCache, Drawn]:
    """Append ``count`` tokens of each sequence from position ``start`` on and draw the token that
    follows them. A long prompt, of ``length`` tokens, comes in several calls; only the last one's
    token is meant."""
    rows = sampling.unpack(packed_BC)
    model, x_BTD, cache = _append(table, weights, cache, token_BT, start_B, length_B)
    x_B1D = last_token(x_BTD, jax.reshard(count_B, table.plan.spec("batch")))
    rows = dataclasses.replace(rows, position_B=start_B + count_B - 1)
    return cache, _draw(table, model, x_B1D, rows)


def decode(
    table: WeightTable, weights: Leaves, cache: KVCache, rows: Rows
) -> tuple[KVCache, Drawn]:
    """One token for every sequence: write the last token's keys and values, draw the next."""
    token_B1, at_B = rows.token_B[:, None], rows.position_B
    model, x_B1D, cache = _append(table, weights, cache, token_B1, at_B, at_B + 1)
    return cache, _draw(table, model, x_B1D, rows)


def _append(
    table: WeightTable, weights: Leaves, cache: KVCache, token_BT, start_B, length_B, taps=None
):
    """The model, the residual stream of T tokens from ``start`` on, and the cache with them."""
    plan, model = table.plan, table.module(weights)
    position_BT = start_B[:, None] + jnp.arange(token_BT.shape[1], dtype=jnp.int32)[None, :]
    by_batch = plan.spec("batch", None)
    token_BT, position_BT = jax.reshard(token_BT, by_batch), jax.reshard(position_BT, by_batch)
    length_B = jax.reshard(length_B, plan.spec("batch"))
    x_BTD, cache = model(token_BT, position_BT, length_B, cache, taps)
    return model, x_BTD, cache


def _draw(table: WeightTable, model, x_B1D: jax.Array, rows: Rows) -> Drawn:
    plan = model.head_plan
    logits_B1V = model.logits(x_B1D)
    shape = (logits_B1V.shape[0], logits_B1V.shape[2])
    logits_BV = plan.reshape(logits_B1V, shape, "batch", "vocab")
    with jax.named_scope("sampler"):
        return sample(plan, table.config.vocab, logits_BV, rows)


def decode_many(
    table: WeightTable,
    most: int,
    weights: Leaves,
    cache: KVCache,
    packed_BC: jax.Array,
    wanted: jax.Array,
) -> tuple[KVCache, Drawn, jax.Array]:
    """Up to ``wanted`` tokens (at most ``most``) for every sequence, stop conditions checked on the
    device. Returns arrays with a leading axis N; -1 where a sequence had already ended. The last
    result is the ``packed`` with which the sequences go on: the next dispatch need not wait until
    the host has seen these tokens."""
    rows = sampling.unpack(packed_BC)
    B = packed_BC.shape[0]
    out = Drawn(
        jnp.full((most, B), -1, jnp.int32),
        jnp.zeros((most, B), jnp.float32),
        jnp.zeros((most, B, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((most, B, MAX_LOGPROBS), jnp.float32),
    )

    def going(state):
        i, _, rows, _ = state
        return (i < wanted) & jnp.any(rows.remaining_B > 0)

    def body(state):
        i, cache, rows, out = state
        rows = on_all(table.plan, rows)
        cache, drawn = decode(table, weights, cache, rows)
        live_B = rows.remaining_B > 0
        token_B = jnp.where(live_B, drawn.token_B, -1)
        drawn = dataclasses.replace(drawn, token_B=token_B)
        out = jax.tree.map(lambda all_, new: all_.at[i].set(new), out, drawn)
        stop_B = jnp.any(token_B[:, None] == rows.stop_BE, axis=-1) | (token_B < 0)
        rows = dataclasses.replace(
            rows,
            token_B=jnp.where(live_B & (token_B >= 0), token_B, rows.token_B),
            position_B=rows.position_B + live_B.astype(jnp.int32),
            remaining_B=jnp.where(stop_B, 0, rows.remaining_B - live_B.astype(jnp.int32)),
        )
        return i + 1, cache, rows, out

    _, cache, rows, out = jax.lax.while_loop(going, body, (jnp.int32(0), cache, rows, out))
    packed_BC = sampling.repack(packed_BC, rows.token_B, rows.position_B, rows.remaining_B)
    return cache, out, packed_BC


def insert(table: WeightTable, cache: KVCache, one: KVCache, slot_D: jax.Array) -> KVCache:
    """Copy the sequences of ``one``, a cache of a single row per replica, into row ``slot`` of each
    replica's part of ``cache``; a negative slot copies nothing."""
    slot_D = jax.reshard(slot_D, table.plan.spec("batch"))
    layers = []
    for n, (held, new) in enumerate(zip(cache.layers, one.layers, strict=True)):
        copy = functools.partial(insert_row, table.plan.at(f"blocks.{n}.attn"), slot_D=slot_D)
        layers.append(jax.tree.map(copy, held, new))
    return KVCache(tuple(layers))


def score(
    table: WeightTable,
    weights: Leaves,
    cache: KVCache,
    token_BT: jax.Array,
    start_B: jax.Array,
    length_B: jax.Array,
) -> tuple[KVCache, jax.Array]:
    """Like prefill, but returns float32 logits ``[B, T, V]`` of every position."""
    model, x_BTD, cache = _append(table, weights, cache, token_BT, start_B, length_B)
    return cache, model.logits(x_BTD)


def states(
    table: WeightTable,
    weights: Leaves,
    cache: KVCache,
    token_BT: jax.Array,
    start_B: jax.Array,
    length_B: jax.Array,
) -> tuple[KVCache, jax.Array]:
    """Like score, but returns the residual stream as it is after the embedding, after every block
    and after the final norm: ``[L + 2, B, T, D]``."""
    taps: list[jax.Array] = []
    _, x_BTD, cache = _append(table, weights, cache, token_BT, start_B, length_B, taps)
    return cache, jnp.stack([*taps, x_BTD.astype(jnp.float32)])
