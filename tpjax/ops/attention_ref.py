"""Attention as its definition says it, the measure for every faster one.

B sequences, T new tokens, S cache positions, N query heads, K key/value heads, G = N / K, H head dim.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a fully masked row is uniform and not NaN


def attend(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, position_BT: jax.Array, scale: float
) -> jax.Array:
    """``o_BTNH``: each query sees cache positions up to and including its own. Scores and softmax
    in float32; the weights are cast to the values' dtype before the second product."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    precision = jax.lax.Precision.HIGHEST if q_BTNH.dtype == jnp.float32 else None
    score = jnp.einsum(
        "BTKGH,BKSH->BKGTS",
        q_BTKGH,
        k_BKSH,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    visible_BTS = jnp.arange(S)[None, None, :] <= position_BT[:, :, None]
    score = jnp.where(visible_BTS[:, None, None], score * scale, MASKED)
    share = jax.nn.softmax(score, axis=-1).astype(v_BKSH.dtype)
    out = jnp.einsum(
        "BKGTS,BKSH->BTKGH",
        share,
        v_BKSH,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return out.astype(q_BTNH.dtype).reshape(B, T, N, H)
