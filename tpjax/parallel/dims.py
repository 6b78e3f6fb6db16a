"""How one dimension of a weight is laid out: padded, or with its heads in another order.

Checkpoints hold ``stored`` elements; devices hold ``size``, which is more where a degree does not
divide them. What no checkpoint has is exactly zero and adds exactly nothing.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

MeshAxes = tuple[str, ...]


@dataclass(frozen=True)
class Dim:
    """``axis``: its logical axis. ``unit``: elements that stay together (a head). ``order``: the
    stored unit of every place, -1 where there is none; () is all of them in order, then padding.
    """

    axis: str | None
    stored: int
    size: int
    unit: int = 1
    order: tuple[int, ...] = ()

    def runs(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """The places ``low`` to ``high`` as stored: (first place, first stored, how many). What no
        run covers is padding."""
        if not self.order:
            if low < min(high, self.stored):
                yield low, low, min(high, self.stored) - low
            return
        at = low
        while at < high:
            place, inside = divmod(at, self.unit)
            end = min(high, (place + 1) * self.unit)
            # Neighbours that are stored one after another are one run.
            while end < high and self._follows(end // self.unit):
                end = min(high, end + self.unit)
            if self.order[place] >= 0:
                yield at, self.order[place] * self.unit + inside, end - at
            at = end

    def _follows(self, place: int) -> bool:
        before, here = self.order[place - 1], self.order[place]
        return here == before + 1 if before >= 0 else here < 0


@dataclass(frozen=True)
class Heads:
    """Which stored head is at every place; -1 is padding. Query heads of one key/value head are
    always on a device that has it."""

    queries: tuple[int, ...]
    kv: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def place_heads(heads: int, kv_heads: int, shards: int, copies: int) -> Heads:
    """Heads on ``shards`` x ``copies`` devices: key/value heads are split into ``shards``, each on
    ``copies`` devices which share its query heads.

    Group by group: where ``copies`` does not divide the query heads of a key/value head, each of
    its groups is padded; where ``shards`` does not divide the key/value heads, whole groups are.
    """
    group = heads // kv_heads
    kv_local, group_local = -(-kv_heads // shards), -(-group // copies)
    kv = range(kv_local * shards)

    def query(k: int, g: int) -> int:
        return k * group + g if k < kv_heads and g < group else -1

    queries = (
        query(shard * kv_local + k, copy * group_local + g)
        for shard in range(shards)
        for copy in range(copies)
        for k in range(kv_local)
        for g in range(group_local)
    )
    return Heads(tuple(queries), tuple(k if k < kv_heads else -1 for k in kv))


def head_dim(axis: str, places: tuple[int, ...], stored: int, unit: int) -> Dim:
    """The dimension of ``stored`` heads of ``unit`` elements, laid out as ``places``."""
    plain = tuple(range(stored)) + (-1,) * (len(places) - stored)
    return Dim(axis, stored * unit, len(places) * unit, unit, () if places == plain else places)
