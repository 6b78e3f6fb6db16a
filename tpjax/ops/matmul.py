"""The matrix product every Linear uses.

R rows (tokens), I input features, O output features.
"""

import jax
import jax.numpy as jnp

from tpjax.plan import Plan


def matmul(
    plan: Plan, x_RI: jax.Array, w_OI: jax.Array, out_axis: str | None, partial: tuple[str, ...]
) -> jax.Array:
    """``x @ w.T`` in float32, not yet summed over the mesh axes ``partial``. Float32 operands are
    multiplied at full precision (a GPU would otherwise round them to TF32).

    Both operands have two dimensions: with a third, XLA on a CPU transposes the weight first.
    """
    return jnp.einsum(
        "RI,OI->RO",
        x_RI,
        w_OI,
        precision=jax.lax.Precision.HIGHEST if x_RI.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
        out_sharding=plan.spec("batch", out_axis, partial=partial),
    )
