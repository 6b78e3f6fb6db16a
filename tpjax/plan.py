"""Plan: how a model runs on these devices. Mesh, rules and the way sums are made, in one value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpjax.config import ModelConfig
from tpjax.errors import UsageError
from tpjax.parallel import mesh as meshes
from tpjax.parallel.collectives import SUMS, added_once
from tpjax.parallel.dims import Dim, Heads, MeshAxes
from tpjax.parallel.layout import Layout, Unsplit
from tpjax.parallel.rules import Rules
from tpjax.patterns import Patterns, decide, normal


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Hashable, immutable, and the only thing a layer needs to know about devices."""

    mesh: Mesh
    rules: Rules = field(default_factory=Rules)
    sum_algorithm: str = "xla"
    unsplit: Unsplit = ()  # modules in which some logical axes are whole
    patterns: Patterns = ()  # which decide that, once a model is there
    allow: tuple[str, ...] = ()  # weights that they may leave whole though they are large

    def __post_init__(self):
        if self.sum_algorithm not in SUMS:
            known = ", ".join(SUMS)
            raise UsageError(f"sum_algorithm={self.sum_algorithm!r}: known are {known}")

    @classmethod
    def from_patterns(
        cls,
        patterns: Mapping[str, Sequence[str | None] | str],
        *,
        mesh: Mesh | None = None,
        allow: Sequence[str] = (),
    ) -> "Plan":
        """A plan whose patterns say what is split: ``{"blocks.*.attn.q": ("embed", "tensor")}``, or
        transformers' ``base_model_tp_plan`` (see `tpjax.patterns`); by default over all devices.
        Whether they suit a model is checked when it is known."""
        mesh = mesh or meshes.make_mesh(tensor=len(jax.devices()))
        return cls(mesh=mesh, patterns=normal(patterns), allow=tuple(allow))

    def fit(self, config: ModelConfig) -> "Plan":
        """This plan on the mesh that suits the model (see `Layout.fit`), with what its patterns
        leave whole. Raises UsageError where patterns and model do not agree."""
        layout = self.layout.fit(config)
        if self.patterns:
            layout = decide(config, layout, self.patterns, self.allow).applied(layout)
        mesh = self.mesh
        if layout.sizes != self.layout.sizes:
            mesh = meshes.reshaped(mesh, layout.sizes)
        return replace(self, mesh=mesh, rules=layout.rules, unsplit=layout.unsplit)

    def at(self, path: str) -> "Plan":
        """The plan of one module, or of a weight in it."""
        layout = self.layout.at(path)
        return self if layout is self.layout else replace(self, rules=layout.rules, unsplit=())

    @cached_property
    def layout(self) -> Layout:
        """What this plan is without devices."""
        meshes.check_axes(self.mesh)
        return Layout(tuple(self.mesh.shape.values()), self.rules, self.unsplit)

    @property
    def data(self) -> int:
        """Replicas of the model that share the batch."""
        return self.layout.data

    @property
    def tensor_degree(self) -> int:
        """Devices one replica is spread over."""
        return self.layout.tensor_degree

    @property
    def platform(self) -> str:
        """``cpu``, ``gpu`` or ``tpu``; compile-only devices say what they stand for."""
        platform: str = self.mesh.devices.flat[0].platform
        return "gpu" if platform in ("cuda", "rocm") else platform

    def mesh_axes(self, axis: str | None) -> MeshAxes:
        """The mesh axes a logical axis really is split over."""
        return self.layout.mesh_axes(axis)

    def shards(self, axis: str | None) -> int:
        """Into how many pieces a logical axis is split."""
        return self.layout.shards(axis)

    def dim(self, axis: str, size: int) -> Dim:
        """A dimension of ``size`` elements, padded at its end so that the axis splits evenly."""
        return self.layout.dim(axis, size)

    def heads(self, config: ModelConfig) -> Heads:
        """Which head is where."""
        return self.layout.heads(config)

    @property
    def sharing(self) -> MeshAxes:
        """The mesh axes along which devices hold the same key/value heads."""
        return self.layout.sharing

    def spec(self, *axes: str | None, partial: MeshAxes = ()) -> PartitionSpec:
        return self.layout.splitting.spec(*axes, partial=partial)

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*axes))

    def sum(
        self,
        y: jax.Array,
        partial: MeshAxes,
        *axes: str | None,
        onto: jax.Array | None = None,
    ) -> jax.Array:
        """The one place where partial sums of products become sums. ``axes``: logical axes of the
        result; ``onto``: what they are added to, in their dtype and before they are summed, so that
        nothing is left to be added after that."""
        if not partial:
            return y if onto is None else y + onto.astype(y.dtype)
        unreduced = self.spec(*axes, partial=partial)
        if onto is not None:
            y = added_once(y, onto, partial, unreduced, self.spec(*axes))
        return SUMS[self.sum_algorithm](y, partial, unreduced, self.spec(*axes))

    def reshape(self, x: jax.Array, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
        """Reshape with the result's logical axes stated, as explicit meshes ask for."""
        return jax.numpy.reshape(x, shape, out_sharding=self.spec(*axes))
