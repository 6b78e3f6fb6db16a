"""How fast this machine's devices can read memory, measured now: the limit decode runs against."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from tpjax.checkpoint.room import Room

_REPEATS = 7


def read_bandwidth(platform: str, mib: int = 512) -> float:
    """Bytes per second: the best of a few repeats, as it is a limit; of the host's memory for
    ``cpu`` (all cores at once, shared by forced devices) or of one accelerator's."""
    return _host(mib) if platform == "cpu" else _device(mib)


def _host(mib: int) -> float:
    # One dot product per core reads its own block and nothing else; BLAS releases the GIL. Of 64
    # bits, as that of float32 adds up slower than some memory is read; and where weights lie, as
    # pages of four kilobytes are read slower too (BENCHMARKS.md).
    cores = os.cpu_count() or 1
    numbers = (mib << 17) // cores
    room = Room([8 * numbers] * cores)
    blocks = [room.empty((numbers,), np.dtype(np.float64)) for _ in range(cores)]
    for block in blocks:
        block.fill(1)
    with ThreadPoolExecutor(cores) as pool:
        return _rate(sum(b.nbytes for b in blocks), lambda: list(pool.map(lambda b: b @ b, blocks)))


def _device(mib: int) -> float:
    block = jnp.ones((mib << 18,), jnp.float32)
    read = jax.jit(jnp.max).lower(block).compile()
    return _rate(block.nbytes, lambda: jax.block_until_ready(read(block)))


def _rate(nbytes: int, once) -> float:
    once()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return nbytes / min(seconds)
