"""Plan: how a model runs on these devices. Mesh, rules and the way sums are made, in one value."""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpjax.config import ModelConfig
from tpjax.errors import UsageError
from tpjax.parallel import mesh as meshes
from tpjax.parallel.collectives import SUMS
from tpjax.parallel.dims import Dim, Heads, place_heads
from tpjax.parallel.rules import MeshAxes, Rules


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Hashable, immutable, and the only thing a layer needs to know about devices."""

    mesh: Mesh
    rules: Rules = field(default_factory=Rules)
    sum_algorithm: str = "xla"

    def __post_init__(self):
        if self.sum_algorithm not in SUMS:
            known = ", ".join(SUMS)
            raise UsageError(f"sum_algorithm={self.sum_algorithm!r}: known are {known}")

    def fit(self, config: ModelConfig) -> "Plan":
        """This plan on the mesh that suits the model (see `tpjax.parallel.mesh.fit`)."""
        mesh, heads = meshes.fit(self.mesh, config)
        rules = self.rules
        usual = Rules()
        if (rules.heads, rules.kv_heads) == (usual.heads, usual.kv_heads):  # nobody has decided
            rules = replace(rules, kv_heads=heads.kv, heads=heads.kv + heads.copies)
        return replace(self, mesh=mesh, rules=rules)

    @property
    def data(self) -> int:
        """Replicas of the model that share the batch."""
        return self.mesh.shape["data"]

    @property
    def tensor_degree(self) -> int:
        """Devices one replica is spread over."""
        return meshes.tensor_degree(self.mesh)

    @property
    def platform(self) -> str:
        """``cpu``, ``gpu`` or ``tpu``; compile-only devices say what they stand for."""
        platform: str = self.mesh.devices.flat[0].platform
        return "gpu" if platform in ("cuda", "rocm") else platform

    @cached_property
    def _splitting(self) -> Rules:
        """The rules without mesh axes of size one, over which XLA would still emit collectives."""

        def real(names: MeshAxes) -> MeshAxes:
            return tuple(name for name in names if self.mesh.shape[name] > 1)

        return Rules(**{f.name: real(getattr(self.rules, f.name)) for f in fields(Rules)})

    def mesh_axes(self, axis: str | None) -> MeshAxes:
        """The mesh axes a logical axis really is split over."""
        return self._splitting.mesh_axes(axis)

    def shards(self, axis: str | None) -> int:
        """Into how many pieces a logical axis is split."""
        n = 1
        for name in self.mesh_axes(axis):
            n *= self.mesh.shape[name]
        return n

    def dim(self, axis: str, size: int) -> Dim:
        """A dimension of ``size`` elements, padded at its end so that the axis splits evenly."""
        n = self.shards(axis)
        return Dim(axis, size, -(-size // n) * n)

    def heads(self, config: ModelConfig) -> Heads:
        """Which head is where (see `tpjax.parallel.dims.place_heads`)."""
        shards = self.shards("kv_heads")
        copies = self.shards("heads") // shards
        return place_heads(config.heads, config.kv_heads, shards, copies)

    @property
    def sharing(self) -> MeshAxes:
        """The mesh axes along which devices hold the same key/value heads."""
        kv = self.mesh_axes("kv_heads")
        return tuple(a for a in self.mesh_axes("heads") if a not in kv)

    def spec(self, *axes: str | None, partial: MeshAxes = ()) -> PartitionSpec:
        return self._splitting.spec(*axes, partial=partial)

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*axes))

    def sum(self, y: jax.Array, partial: MeshAxes, *axes: str | None) -> jax.Array:
        """The one place where partial sums of products become sums. ``axes``: logical axes of the
        result."""
        if not partial:
            return y
        unreduced = self.spec(*axes, partial=partial)
        return SUMS[self.sum_algorithm](y, partial, unreduced, self.spec(*axes))

    def reshape(self, x: jax.Array, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
        """Reshape with the result's logical axes stated, as explicit meshes ask for."""
        return jax.numpy.reshape(x, shape, out_sharding=self.spec(*axes))
