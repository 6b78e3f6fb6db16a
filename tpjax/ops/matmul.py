"""The matrix product every Linear uses.

B sequences, T tokens, I input features, O output features.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def matmul(
    x_BTI: jax.Array, w_OI: jax.Array, out_spec: PartitionSpec, *, pad_rows: bool
) -> jax.Array:
    """``x @ w.T`` accumulated and returned in float32, at full precision for float32 operands (a
    GPU would otherwise round them to TF32).

    With ``pad_rows`` a single row becomes two, and the result has them both: XLA's fast bfloat16
    kernels on a CPU refuse one row, and the path it falls back to copies every weight to float32 on
    every call (0.6 to 1.9 GB/s instead of 14 or more, BENCHMARKS.md).
    """
    rows = x_BTI.shape[0] * x_BTI.shape[1]
    if pad_rows and rows == 1 and x_BTI.dtype != jnp.float32:
        x_BTI = jnp.concatenate([x_BTI, x_BTI], axis=1)
    precision = jax.lax.Precision.HIGHEST if x_BTI.dtype == jnp.float32 else None
    return jnp.einsum(
        "BTI,OI->BTO",
        x_BTI,
        w_OI,
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=out_spec,
    )
