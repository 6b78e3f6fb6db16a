"""Logical axis -> mesh axes: the one table that decides how everything is split."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tpjax.parallel.dims import MeshAxes

if TYPE_CHECKING:  # the planner reads the table without jax
    from jax.sharding import PartitionSpec, Sharding


@dataclass(frozen=True, kw_only=True)
class Rules:
    """For each logical axis, the mesh axes it is split over, outermost first; () is not split."""

    batch: MeshAxes = ("data",)
    vocab: MeshAxes = ("expert", "tensor", "rep")
    heads: MeshAxes = ("expert", "tensor", "rep")
    kv_heads: MeshAxes = ("expert", "tensor")
    mlp: MeshAxes = ("expert", "tensor", "rep")
    experts: MeshAxes = ("expert",)
    expert_mlp: MeshAxes = ("tensor", "rep")
    embed: MeshAxes = ()

    def mesh_axes(self, axis: str | None) -> MeshAxes:
        """The mesh axes of one logical axis; None, an axis nobody names, is never split."""
        if axis is None:
            return ()
        try:
            return self.__dict__[axis]
        except KeyError:
            raise KeyError(f"no rule for logical axis {axis!r}: add it to Rules") from None

    def spec(self, *axes: str | None, partial: MeshAxes = ()) -> "PartitionSpec":
        """The PartitionSpec of an array with these logical axes.

        ``partial`` names mesh axes over which the array still is a sum to be made. Raises
        ValueError when one mesh axis would split two axes of the same array.
        """
        from jax.sharding import PartitionSpec

        per_axis = [self.mesh_axes(axis) for axis in axes]
        used = [name for names in per_axis for name in names] + list(partial)
        twice = {name for name in used if used.count(name) > 1}
        if twice:
            raise ValueError(f"axes {axes} (partial {partial}) use mesh axis {sorted(twice)} twice")
        entries = [names[0] if len(names) == 1 else (names or None) for names in per_axis]
        return PartitionSpec(*entries, unreduced=frozenset(partial))


def sharding_word(sharding: "Sharding") -> str:
    """``tensor, -``: which mesh axes split each axis of an array; ``-`` is none."""
    from jax.sharding import NamedSharding

    assert isinstance(sharding, NamedSharding)
    entries = (e if isinstance(e, tuple) else (e,) for e in sharding.spec)
    return ", ".join(" x ".join(name or "-" for name in names) for names in entries) or "-"
