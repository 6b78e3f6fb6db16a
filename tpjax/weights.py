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
from tpjax.plan import Plan


@dataclass(frozen=True)
class WeightSpec:
    """One weight: where it sits in the model and how it is laid over the mesh.

    ``stored`` is the shape a checkpoint holds; ``shape`` is larger where the vocabulary was padded.
    ``split`` is the dimension that meshes may cut, None if there is none, and ``unit`` how many of
    its elements stay together: a head.
    """

    path: str
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]
    sharding: Sharding
    split: int | None
    unit: int

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
        axes = tuple(leaf.get_metadata()["axes"])
        vocab = self.config.vocab
        stored = tuple(vocab if a == "vocab" else n for a, n in zip(axes, leaf.shape, strict=True))
        rules = self.plan.rules
        split = next((n for n, axis in enumerate(axes) if rules.mesh_axes(axis)), None)
        heads = split is not None and axes[split] in ("heads", "kv_heads")
        return WeightSpec(
            path=".".join(map(str, path)),
            shape=tuple(leaf.shape),
            stored=stored,
            dtype=np.dtype(leaf.dtype),
            axes=axes,
            sharding=self.plan.sharding(*axes),
            split=split,
            unit=self.config.head_dim if heads else 1,
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
