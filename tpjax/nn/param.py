"""Declaring a weight: its dimensions and dtype, said once."""

import jax
import jax.numpy as jnp
from flax import nnx

from tpjax.parallel.dims import Dim


def weight(dims: tuple[Dim, ...], dtype: str) -> nnx.Param:
    """A declared weight. Modules are only ever built under `nnx.eval_shape`, so nothing is
    allocated here; the values come from a checkpoint (see `tpjax.weights`)."""
    return nnx.Param(jnp.zeros(tuple(dim.size for dim in dims), dtype), dims=dims)


def value(param: nnx.Param) -> jax.Array:
    """The array of a weight, inside a traced function."""
    return param[...]
