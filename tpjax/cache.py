"""The key/value cache. B sequences, K key/value heads, S positions, H head dim."""

from dataclasses import dataclass
from typing import Any

import jax

from tpjax.config import ModelConfig
from tpjax.ops.attention import held_dtype
from tpjax.plan import Plan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Contiguous: one pair of arrays ``[B, K, S, H]`` per layer, slot s holding position s.

    Per layer, so that a donated cache is updated in place; by position, so that what a sequence
    sees never depends on who shares its batch. Slots beyond a sequence's length hold leftovers
    and are never visible.
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]

    @property
    def context(self) -> int:
        """Positions of a sequence."""
        return self.layers[0][0].shape[2]

    @classmethod
    def abstract(cls, config: ModelConfig, plan: Plan, rows: int, length: int) -> "KVCache":
        """Shapes, dtypes and shardings, for lowering without allocating."""

        dtype = held_dtype(config.dtype, plan.platform == "cpu")

        def layer(n: int) -> Any:
            here = plan.at(f"blocks.{n}.attn")
            shape = (rows, len(here.heads(config).kv), length, config.head_dim)
            sharding = here.sharding("batch", "kv_heads", None, None)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        return cls(tuple((layer(n), layer(n)) for n in range(config.layers)))

    @staticmethod
    def bytes_per_device(config: ModelConfig, plan: Plan, rows: int, length: int) -> int:
        """Bytes one device holds of ``rows`` sequences of ``length`` positions."""
        return rows * length * plan.layout.cached_per_token(config) // plan.data
