"""WeightTable: every weight's path, shape, dtype, axes and sharding.

One table feeds the loader, the compiler, the memory check and the tests. It needs no devices, and
Flax only to trace the model: a start that finds its executables on disk does without.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes  # noqa: F401  (numpy knows bfloat16 by it)
import numpy as np
from jax.sharding import Sharding

from tpjax import inventory
from tpjax.config import ModelConfig
from tpjax.parallel.dims import Dim
from tpjax.plan import Plan

if TYPE_CHECKING:
    from tpjax.nn.decoder import Decoder


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
        listed = inventory.weights(config, plan.layout)
        self.specs = tuple(map(self._spec, sorted(listed, key=lambda weight: _place(weight.path))))

    def _spec(self, weight: inventory.Weight) -> WeightSpec:
        dims = weight.dims
        cut = [bool(self.plan.rules.mesh_axes(dim.axis)) for dim in dims]
        return WeightSpec(
            path=weight.path,
            dims=dims,
            dtype=np.dtype(weight.dtype),
            sharding=self.plan.at(weight.path).sharding(*(dim.axis for dim in dims)),
            split=cut.index(True) if any(cut) else None,
            split_inside=cut[1:].index(True) if any(cut[1:]) else None,
        )

    @cached_property
    def _declared(self) -> tuple[Any, Any]:
        """The model without its weights, and how its state is a tree of them. Raises RuntimeError
        if it declares other weights than the table lists, or in another order."""
        from flax import nnx

        from tpjax.nn.decoder import Decoder

        graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(self.config, self.plan)))
        declared = [
            (".".join(map(str, path)), leaf.get_metadata()["dims"], np.dtype(leaf.dtype))
            for path, leaf in nnx.to_flat_state(state)
        ]
        if declared != [(spec.path, spec.dims, spec.dtype) for spec in self.specs]:
            raise RuntimeError("tpjax.nn and tpjax.inventory list different weights")
        return graph, jax.tree.structure(state)

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

    def module(self, leaves: Sequence[jax.Array]) -> "Decoder":
        """The model around these leaves. Only ever called while tracing: the host pays for the
        module once per compile, never per step."""
        from flax import nnx

        graph, treedef = self._declared
        return nnx.merge(graph, jax.tree.unflatten(treedef, leaves))


def _place(path: str) -> tuple:
    """Where a weight is among the leaves: modules by name, layers by number."""
    return tuple(int(word) if word.isdigit() else word for word in path.split("."))
