"""Rotary position embedding, half-split layout. B sequences, T tokens, N heads, H head dim."""

import jax
import jax.numpy as jnp

from tpjax.config import Rope

CosSin = tuple[jax.Array, jax.Array]


def cos_sin(rope: Rope, head_dim: int, position_BT: jax.Array, dtype) -> CosSin:
    """Cosine and sine ``[B, T, 1, H / 2]``; angles in float32, cast before they are multiplied."""
    inv_freq_H = jnp.asarray(rope.inv_freq(head_dim))
    angle = position_BT.astype(jnp.float32)[:, :, None, None] * inv_freq_H[None, None, None, :]
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x_BTNH: jax.Array, cos_sin: CosSin) -> jax.Array:
    """The first half of every head is rotated against the second."""
    cos, sin = cos_sin
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
