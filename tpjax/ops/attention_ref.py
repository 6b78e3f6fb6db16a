"""Attention as its definition says it, the measure for every faster one.

B sequences, T new tokens, S cache positions, N query heads, K key/value heads, G = N / K, H head
dim, R = G T rows of one key/value head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a fully masked row is uniform and not NaN


class Scores(NamedTuple):
    """What becomes of products of queries and keys: times ``scale``; squeezed between plus and
    minus ``softcap`` by a tanh; seen only within the last ``window`` positions."""

    scale: float
    softcap: float | None = None
    window: int | None = None


def attend(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, position_BT: jax.Array, scores: Scores
) -> jax.Array:
    """``o_BTNH``: each query sees cache positions up to and including its own. Scores and softmax
    in float32; the weights are cast to the values' dtype before the second product."""
    q_BKRH = grouped(q_BTNH, k_BKSH.shape[1])
    share = jax.nn.softmax(masked(q_BKRH, k_BKSH, position_BT, 0, scores), axis=-1)
    out = dot("BKRS,BKSH->BKRH", share.astype(v_BKSH.dtype), v_BKSH)
    return ungrouped(out.astype(q_BTNH.dtype), q_BTNH.shape[1])


def masked(
    q_BKRH: jax.Array, k_BKSH: jax.Array, position_BT: jax.Array, first, scores: Scores
) -> jax.Array:
    """Scores ``[B, K, R, S]`` in float32 of keys from position ``first`` on, `MASKED` where a query
    does not see the key."""
    B, K, R, _ = q_BKRH.shape
    S, T = k_BKSH.shape[2], position_BT.shape[1]
    score = dot("BKRH,BKSH->BKRS", q_BKRH, k_BKSH).reshape(B, K, R // T, T, S)
    score = score * scores.scale
    if scores.softcap is not None:
        score = jnp.tanh(score / scores.softcap) * scores.softcap
    back_BTS = position_BT[:, :, None] - (first + jnp.arange(S, dtype=jnp.int32))[None, None, :]
    visible_BTS = back_BTS >= 0
    if scores.window is not None:
        visible_BTS &= back_BTS < scores.window
    return jnp.where(visible_BTS[:, None, None], score, MASKED).reshape(B, K, R, S)


def grouped(q_BTNH: jax.Array, K: int) -> jax.Array:
    """``q_BKRH``: queries that share a key/value head become rows of one product; the small array
    is the one that is transposed, not the scores."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    return q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)


def ungrouped(o_BKRH: jax.Array, T: int) -> jax.Array:
    """``o_BTNH``, the opposite."""
    B, K, R, H = o_BKRH.shape
    o_BKGTH = o_BKRH.reshape(B, K, R // T, T, H)
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, R // T * K, H)


def dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in float32, of float32 operands at full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
