"""WeightTable: every weight's path, shape, dtype, axes and sharding, from the model's declaration.

One table feeds the loader, the compiler, the memory check and the tests. It needs no devices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from tpjax.config import ModelConfig
from tpjax.nn.decoder import Decoder
from tpjax.parallel.dims import Dim
from tpjax.plan import Plan


@dataclass(frozen=True)
class WeightSpec:
    """One weight: where it sits in the model and how it is laid over the mesh.

    ``shape`` is larger than ``stored``, the shape checkpoints hold, where a dimension is padded.
    ``split`` is the first dimension that meshes may cut, None if there is none; ``split_inside``
    the same of one expert's weight.
    """

    path: str
    dims: tuple[Dim, ...]
    dtype: np.dtype
    sharding: Sharding
    split: int | None
    split_inside: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dim.size for dim in self.dims)

    @property
    def stored(self) -> tuple[int, ...]:
        return tuple(dim.stored for dim in self.dims)

    @property
    def axes(self) -> tuple[str | None, ...]:
        return tuple(dim.axis for dim in self.dims)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_per_device(self) -> int:
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize


class WeightTable:
    """The weights of one model on one plan, in the order its flat leaves have everywhere."""

    def __init__(self, config: ModelConfig, plan: Plan):
        self.config, self.plan = config, plan
        model = nnx.eval_shape(lambda: Decoder(config, plan))
        self._graph, state = nnx.split(model)
        self._treedef = jax.tree.structure(state)
        self.specs = tuple(self._spec(path, leaf) for path, leaf in nnx.to_flat_state(state))

    def _spec(self, path, leaf) -> WeightSpec:
        dims: tuple[Dim, ...] = tuple(leaf.get_metadata()["dims"])
        cut = [bool(self.plan.rules.mesh_axes(dim.axis)) for dim in dims]
        name = ".".join(map(str, path))
        return WeightSpec(
            path=name,
            dims=dims,
            dtype=np.dtype(leaf.dtype),
            sharding=self.plan.at(name).sharding(*(dim.axis for dim in dims)),
            split=cut.index(True) if any(cut) else None,
            split_inside=cut[1:].index(True) if any(cut[1:]) else None,
        )

    @cached_property
    def by_path(self) -> dict[str, WeightSpec]:
        return {spec.path: spec for spec in self.specs}

    @property
    def parameters(self) -> int:
        """As published: tied weights once, padding not at all."""
        return sum(math.prod(spec.stored) for spec in self.specs)

    @property
    def bytes_per_device(self) -> int:
        return sum(spec.bytes_per_device for spec in self.specs)

    def abstract(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The leaves without values, for lowering."""
        return tuple(
            jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding) for s in self.specs
        )

    def module(self, leaves: Sequence[jax.Array]) -> Decoder:
        """The model around these leaves. Only ever called while tracing: the host pays for the
        module once per compile, never per step."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._treedef, leaves))
