"""Products a tile at a time, which a CPU does without our kernels: the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpjax.ops import tiles


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 bfloat16", "float32 bfloat16"])
def test_one_of_several_matrices(monkeypatch, dtypes, rows):
    """Found at run time; of so many outputs that the last tile overlaps the one before."""
    monkeypatch.setattr(tiles, "TILE", 2048)
    rng = np.random.default_rng(rows)
    x, w = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape, dtype in zip(((rows, 96), (3, 45, 96)), dtypes.split(), strict=True)
    )
    product = jax.jit(tiles.product)
    for which in range(3):
        want = np.asarray(x, np.float64) @ np.asarray(w[which], np.float64).T
        got = np.asarray(product(x, w, jnp.int32(which)))
        assert got.dtype == np.float32 and np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
