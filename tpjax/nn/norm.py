"""Root-mean-square norm. D embed."""

import jax
import jax.numpy as jnp
from flax import nnx

from tpjax.nn.param import value, weight


class RMSNorm(nnx.Module):
    """``x / rms(x)`` in float32, cast back, and only then times the weight, as Llama does it."""

    def __init__(self, size: int, *, eps: float, dtype: str):
        self.w = weight((size,), ("embed",), dtype)
        self.eps = eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x32 = x_BTD.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return value(self.w)[None, None, :] * (x32 * scale).astype(x_BTD.dtype)
