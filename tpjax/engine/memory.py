"""Does it fit? Asked before anything is allocated, answered in numbers."""

from dataclasses import dataclass

from tpjax import host
from tpjax.buckets import Buckets, at_a_time
from tpjax.cache import KVCache
from tpjax.checkpoint import room
from tpjax.errors import ResourceError
from tpjax.ops.tiles import TILE
from tpjax.plan import Plan
from tpjax.planner import memory as planned
from tpjax.weights import WeightTable

GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes per device, and what a device has (on a CPU: its share of the free host memory)."""

    weights: int
    cache: int
    temporary: int  # an upper bound
    available: int


def check_memory(table: WeightTable, buckets: Buckets) -> Memory:
    """Raise ResourceError if weights and cache cannot fit, with the numbers and what would help.

    Forced CPU devices share the host's memory, so what they need together is compared with it.
    """
    rows = buckets.batch[-1] + (table.plan.data if buckets.batch[-1] > 1 else 0)
    weights = table.bytes_per_device
    # Steps on a shorter cache may hold more beside it: scores of all its positions at once.
    cache, temporary = max(
        (
            (
                KVCache.bytes_per_device(table.config, table.plan, rows, context),
                temporary_bytes(table, buckets, context),
            )
            for context in buckets.contexts
        ),
        key=sum,
    )
    devices, available = table.plan.mesh.devices, free(table.plan)
    if weights + cache + temporary > available:
        raise ResourceError(
            f"not enough memory: each of {devices.size} device(s) needs {weights / GB:.2f} GB for"
            f" weights, {cache / GB:.2f} GB for the cache ({buckets.batch[-1]} sequences of"
            f" {buckets.context} positions) and up to {temporary / GB:.2f} GB while running,"
            f" {available / GB:.2f} GB are free; lower max_model_len or max_num_seqs, or use more"
            " devices"
        )
    return Memory(weights, cache, temporary, available)


def temporary_bytes(table: WeightTable, buckets: Buckets, context: int) -> int:
    """What steps on caches of so many positions hold at once on one device: on accelerators what
    `tpjax plan` says; on a CPU an upper bound: scores and shares of the largest chunk in float32,
    against as many positions as are attended to at a time, a few rows of the widest activation,
    and tiles of matrices of 16 bits as float32."""
    config, split = table.config, table.plan.tensor_degree
    if table.plan.platform != "cpu":
        layout, rows = table.plan.layout, buckets.batch[-1] // table.plan.data
        return max(
            planned.temporary(config, layout, rows, 1, context),
            planned.temporary(config, layout, 1, buckets.chunks[-1], context),
        )
    chunk = buckets.chunks[-1]
    heads = -(-len(table.plan.heads(config).queries) // split)
    scores = 2 * heads * at_a_time(context)
    widest = 4 * (-(-config.mlp // split) + 2 * config.embed)
    logits = 8 * max(buckets.batch) * table.by_path["embed.w"].shape[0] // split
    narrow = [s.bytes_per_device for s in table.specs if len(s.dims) > 1 and s.dtype.itemsize == 2]
    # Tiles in float32. What is one tile XLA may widen long before it is multiplied.
    tiles = 4 * TILE * bool(narrow) + sum(2 * size for size in narrow if size <= TILE)
    return 4 * (chunk * (scores + widest) + logits) + tiles


def free(plan: Plan) -> int:
    """Bytes free on each device, on that which has least; CPU devices have equal shares of the
    host's, with what was got ahead for the weights."""
    if plan.platform == "cpu":
        # In this order: what threads get between the two is then free in neither.
        return (room.got_ahead() + host.free_memory()) // plan.mesh.size
    return min(map(_free, plan.mesh.devices.flat))


def _free(device) -> int:
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 2**63) - stats.get("bytes_in_use", 0)
