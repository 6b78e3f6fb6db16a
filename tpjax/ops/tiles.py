"""Products with matrices that XLA on a CPU would copy, or widen, whole: a tile at a time,
which stays in a core's cache.

M rows, E matrices, I input and O output features.
"""

import jax
import jax.numpy as jnp

TILE = 1 << 20  # bytes of a matrix looked at together


def product(
    x_MI: jax.Array, w_EOI: jax.Array, which: int | jax.Array = 0, on_cpu: bool = True
) -> jax.Array:
    """``x @ w[which].T`` in float32. A matrix of 16 bits meets a single row, and rows of float32,
    as float32: XLA's kernels of 16 bits want two rows, and bring the matrix into an order of their
    own on every call. Elsewhere a matrix is taken as one tile, as it is."""
    _, O, I = w_EOI.shape  # noqa: E741
    tile = max(1, min(O, TILE // (I * w_EOI.dtype.itemsize))) if on_cpu else O
    by_bits = on_cpu and w_EOI.dtype.itemsize == 2
    wide = by_bits and (x_MI.shape[0] == 1 or x_MI.dtype == jnp.float32)
    x_MI = x_MI.astype(jnp.float32) if wide else x_MI

    def part(n, y_MO):
        start = jnp.minimum(n * tile, O - tile)  # the last one overlaps the one before
        zero = start * 0
        at, sizes = (zero + which, start, zero), (1, tile, I)
        if by_bits:
            # Inside the loop: what depends on nothing there XLA does before it, for all tiles.
            x, w, at = jax.lax.optimization_barrier((x_MI, w_EOI, at))
            w_1OI = _as_number(_cut_bits(w, at, sizes), w_EOI.dtype, wide)
        else:
            x, w_1OI = x_MI, jax.lax.dynamic_slice(w_EOI, at, sizes)
        return jax.lax.dynamic_update_slice(y_MO, dot(x, w_1OI[0]), (zero, start))

    y_MO = jnp.zeros((x_MI.shape[0], O), jnp.float32)
    return jax.lax.fori_loop(0, -(-O // tile), part, y_MO)


def _cut_bits(w: jax.Array, at: tuple[jax.Array, ...], sizes: tuple[int, ...]) -> jax.Array:
    """A slice of a two-byte type, taken of integers: XLA on a CPU would convert all of it to
    float32 first."""
    return jax.lax.dynamic_slice(jax.lax.bitcast_convert_type(w, jnp.uint16), at, sizes)


def _as_number(bits: jax.Array, dtype, wide: bool) -> jax.Array:
    """What the bits mean; as float32, or in the dtype they are of."""
    if wide and dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    number = jax.lax.bitcast_convert_type(bits, dtype)
    return number.astype(jnp.float32) if wide else number


def dot(x_RI: jax.Array, w_OI: jax.Array, **more) -> jax.Array:
    """``x @ w.T`` in float32; operands of float32 at full precision, which a GPU would round to
    TF32."""
    return jnp.einsum(
        "RI,OI->RO",
        x_RI,
        w_OI,
        precision=jax.lax.Precision.HIGHEST if x_RI.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
        **more,
    )
