"""Attention as its definition says it, the measure for every faster one.

B sequences, T new tokens, S cache positions, N query heads, K key/value heads, G = N / K, H head
dim, R = G T rows of one key/value head.
"""

import functools
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
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    G = N // K
    # Queries that share a key/value head become rows of one product; the small array is the one
    # that is transposed, not the scores.
    q_BKRH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    precision = jax.lax.Precision.HIGHEST if q_BTNH.dtype == jnp.float32 else None
    dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    score = dot("BKRH,BKSH->BKRS", q_BKRH, k_BKSH).reshape(B, K, G, T, S)
    score = score * scores.scale
    if scores.softcap is not None:
        score = jnp.tanh(score / scores.softcap) * scores.softcap
    back_BTS = position_BT[:, :, None] - jnp.arange(S)[None, None, :]
    visible_BTS = back_BTS >= 0
    if scores.window is not None:
        visible_BTS &= back_BTS < scores.window
    score = jnp.where(visible_BTS[:, None, None], score, MASKED)
    share = jax.nn.softmax(score, axis=-1).astype(v_BKSH.dtype).reshape(B, K, G * T, S)
    out = dot("BKRS,BKSH->BKRH", share, v_BKSH).astype(q_BTNH.dtype)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
