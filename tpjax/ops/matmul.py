"""The matrix product every Linear uses.

R rows (tokens), I input features, O output features.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def matmul(x_RI: jax.Array, w_OI: jax.Array, out_spec: PartitionSpec) -> jax.Array:
    """``x @ w.T`` accumulated and returned in float32, at full precision for float32 operands (a
    GPU would otherwise round them to TF32).

    Both operands have two dimensions: with a third, XLA on a CPU transposes the weight first.
    """
    return jnp.einsum(
        "RI,OI->RO",
        x_RI,
        w_OI,
        precision=jax.lax.Precision.HIGHEST if x_RI.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
        out_sharding=out_spec,
    )
