"""The matrix product every Linear uses.

R rows (tokens), I input features, O output features.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def matmul(x_RI: jax.Array, w_OI: jax.Array, out_spec: PartitionSpec, platform: str) -> jax.Array:
    """``x @ w.T`` accumulated and returned in float32, at full precision for float32 operands (a
    GPU would otherwise round them to TF32).

    Two things here are for XLA's bfloat16 kernels on a CPU; where they are not used, every weight
    is copied to float32 on every call (0.6 to 1.9 GB/s instead of 14 or more, BENCHMARKS.md). They
    refuse a single row, so one row becomes two, *and the result has both*. And both operands have
    two dimensions: with a third, XLA transposes the weight first.
    """
    if platform == "cpu" and x_RI.shape[0] == 1 and x_RI.dtype != jnp.float32:
        x_RI = jnp.concatenate([x_RI, x_RI], axis=0)
    return jnp.einsum(
        "RI,OI->RO",
        x_RI,
        w_OI,
        precision=jax.lax.Precision.HIGHEST if x_RI.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
        out_sharding=out_spec,
    )
