"""Norms, from the residual stream's float32 or a head's dtype to the model's. D the features that
are normalised: the embedding's, or a head's."""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from flax import nnx

from tpjax.config import ModelConfig
from tpjax.nn.param import value, weight
from tpjax.ops.matmul import RootMeanSquare
from tpjax.parallel.dims import Dim


class RMSNorm(nnx.Module):
    """``x / rms(x)`` in float32. Without an ``offset`` it is cast back and only then multiplied by
    the weight, as Llama does it; with one, multiplied by ``offset + weight`` in float32 and then
    cast, as Gemma does it."""

    def __init__(self, size: int, *, eps: float, dtype: str, offset: float = 0.0):
        self.w = weight((Dim(None, size, size),), dtype)
        self.eps, self.offset = eps, offset

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x32 = x_BTD.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        w_D = along_last(value(self.w), x_BTD)
        if self.offset:
            return (x32 * scale * (self.offset + w_D.astype(jnp.float32))).astype(w_D.dtype)
        return w_D * (x32 * scale).astype(w_D.dtype)

    def inside(self) -> RootMeanSquare:
        """The same for a product that normalises its input itself: rounded nowhere."""
        return RootMeanSquare(self.offset + value(self.w).astype(jnp.float32), self.eps)


class LayerNorm(nnx.Module):
    """``(x - mean) / std * w + b``, all in float32, cast at the end."""

    def __init__(self, size: int, *, eps: float, dtype: str):
        self.w = weight((Dim(None, size, size),), dtype)
        self.b = weight((Dim(None, size, size),), dtype)
        self.eps = eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x32 = x_BTD.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        w_D, b_D = (along_last(value(p).astype(jnp.float32), x32) for p in (self.w, self.b))
        return (x32 * scale * w_D + b_D).astype(value(self.w).dtype)


@dataclass(frozen=True)
class Normed:
    """``x_BTD`` normalised, for products that may do that themselves."""

    x_BTD: jax.Array
    norm: RMSNorm | LayerNorm

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x_BTD.shape

    @property
    def dtype(self):
        return self.norm.w.dtype

    @cached_property
    def value(self) -> jax.Array:
        """Normalised now, once for all products."""
        return self.norm(self.x_BTD)


def norm(config: ModelConfig, size: int | None = None) -> RMSNorm | LayerNorm:
    """The model's norm, of the residual stream or of ``size`` features."""
    size = size or config.embed
    if config.norm == "layer":
        return LayerNorm(size, eps=config.norm_eps, dtype=config.dtype)
    return RMSNorm(size, eps=config.norm_eps, dtype=config.dtype, offset=config.norm_offset)


def along_last(w_D: jax.Array, x: jax.Array) -> jax.Array:
    """A vector with as many axes as ``x``, for its last one."""
    return w_D[(None,) * (x.ndim - 1)]
