"""Does it fit? Asked before anything is allocated, answered in numbers."""

from dataclasses import dataclass

import psutil

from tpjax.cache import KVCache
from tpjax.errors import ResourceError
from tpjax.executables import Buckets
from tpjax.weights import WeightTable

GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes per device, and what a device has (on a CPU: its share of the free host memory)."""

    weights: int
    cache: int
    available: int


def check_memory(table: WeightTable, buckets: Buckets) -> Memory:
    """Raise ResourceError if weights and cache cannot fit, with the numbers and what would help.

    Forced CPU devices share the host's memory, so what they need together is compared with it.
    """
    rows = buckets.batch[-1] + (table.plan.data if buckets.batch[-1] > 1 else 0)
    weights = table.bytes_per_device
    cache = KVCache.bytes_per_device(table.config, table.plan, rows, buckets.context)
    devices = table.plan.mesh.devices
    stats = devices.flat[0].memory_stats() if table.plan.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        available = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        available = psutil.virtual_memory().available // devices.size
    if weights + cache > available:
        raise ResourceError(
            f"not enough memory: each of {devices.size} device(s) needs {weights / GB:.2f} GB for"
            f" weights and {cache / GB:.2f} GB for the cache ({buckets.batch[-1]} sequences of"
            f" {buckets.context} positions), {available / GB:.2f} GB are free; lower max_model_len"
            " or max_num_seqs, or use more devices"
        )
    return Memory(weights, cache, available)
