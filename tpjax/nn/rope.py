"""Rotary position embedding, half-split layout. B sequences, T tokens, N heads, H head dim,
I = half of what is rotated of a head."""

import jax
import jax.numpy as jnp

from tpjax.rope import Rope

CosSin = tuple[jax.Array, jax.Array]


def cos_sin(
    rope: Rope, head_dim: int, position_BT: jax.Array, length_B: jax.Array, dtype
) -> CosSin:
    """Cosine and sine ``[B, T, 1, I]``; angles in float32, cast before they are multiplied.

    ``length``: of the whole sequence so far, which some ropes depend on. A prompt is rotated by its
    own length, every later token by the length it makes; keys in the cache stay as they are. That
    is what transformers computes for one prompt and the tokens generated after it.
    """
    angle_BTI = position_BT.astype(jnp.float32)[:, :, None] * _inv_freq(rope, head_dim, length_B)
    scale = jnp.float32(rope.scale)
    cos, sin = jnp.cos(angle_BTI) * scale, jnp.sin(angle_BTI) * scale
    return cos.astype(dtype)[:, :, None, :], sin.astype(dtype)[:, :, None, :]


def _inv_freq(rope: Rope, head_dim: int, length_B: jax.Array) -> jax.Array:
    """Float32 ``[1, 1, I]``, or ``[B, 1, I]`` where it depends on the length."""
    inv_I = jnp.asarray(rope.inv_freq(head_dim))[None, None, :]
    if not rope.grows:
        return inv_I
    length_B11 = length_B[:, None, None]
    if rope.kind == "longrope":
        long_I = jnp.asarray(rope.inv_freq(head_dim, long=True))[None, None, :]
        return jnp.where(length_B11 > rope.original_max_position, long_I, inv_I)
    # Dynamic NTK: theta grows by a power of how far the sequence is beyond the original length.
    dim, most = rope.dim(head_dim), rope.original_max_position
    ratio = jnp.maximum(length_B11, most).astype(jnp.float32) / most
    growth = (rope.factor * ratio - (rope.factor - 1.0)) ** (dim / (dim - 2))
    exponent_I = jnp.arange(0, dim, 2, dtype=jnp.float32)[None, None, :] / dim
    return inv_I / growth**exponent_I


def rotate(x_BTNH: jax.Array, cos_sin: CosSin) -> jax.Array:
    """The first half of what is rotated of every head, against the second; the rest stays."""
    cos, sin = cos_sin
    half = cos.shape[-1]
    a, b, rest = x_BTNH[..., :half], x_BTNH[..., half : 2 * half], x_BTNH[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
