"""Declaring a weight: global shape, dtype and logical axes, said once."""

import jax
import jax.numpy as jnp
from flax import nnx


def weight(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str) -> nnx.Param:
    """A declared weight. Modules are only ever built under `nnx.eval_shape`, so nothing is
    allocated here; the values come from a checkpoint (see `tpjax.weights`)."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def value(param: nnx.Param) -> jax.Array:
    """The array of a weight, inside a traced function."""
    return param[...]
