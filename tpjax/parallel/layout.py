"""Layout: how any array of a model is cut over a mesh, from the sizes of its axes. No jax."""

import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from tpjax.config import ModelConfig, itemsize
from tpjax.parallel.degrees import AXES, fitted
from tpjax.parallel.dims import Dim, Heads, MeshAxes, place_heads
from tpjax.parallel.rules import Rules

Unsplit = tuple[tuple[str, frozenset[str]], ...]  # module -> logical axes that are whole there


@dataclass(frozen=True)
class Layout:
    """``sizes`` of the mesh's axes, in the order of `AXES`. ``unsplit``: modules (``embed``,
    ``blocks.3.mlp``) in which some logical axes are not split, whatever the rules say."""

    sizes: tuple[int, ...]
    rules: Rules = field(default_factory=Rules)
    unsplit: Unsplit = ()

    @classmethod
    def of(cls, data: int = 1, expert: int = 1, tensor: int = 1, rep: int = 1) -> "Layout":
        return cls((data, expert, tensor, rep))

    def fit(self, config: ModelConfig) -> "Layout":
        """This layout with ``tensor`` split into ``tensor`` x ``rep`` where that suits the model.
        Raises UsageError naming what disagrees and the nearest degrees that work."""
        data, expert, tensor, rep = self.sizes
        best, rules, usual = fitted(config, expert, tensor, rep), self.rules, Rules()
        if (rules.heads, rules.kv_heads) == (usual.heads, usual.kv_heads):  # nobody has decided
            rules = replace(rules, kv_heads=best.kv, heads=best.kv + best.copies)
        return replace(self, sizes=(data, expert, best.tensor, best.rep), rules=rules)

    @cached_property
    def shape(self) -> dict[str, int]:
        """Axis -> size."""
        return dict(zip(AXES, self.sizes, strict=True))

    @property
    def data(self) -> int:
        """Replicas of the model that share the batch."""
        return self.sizes[0]

    @property
    def tensor_degree(self) -> int:
        """Devices one replica is spread over."""
        return math.prod(self.sizes[1:])

    def at(self, path: str) -> "Layout":
        """The layout of one module, or of a weight in it."""
        whole = self._whole.get(module_of(path))
        if not self.unsplit:
            return self
        if not whole:
            return replace(self, unsplit=())
        return replace(self, rules=replace(self.rules, **dict.fromkeys(whole, ())), unsplit=())

    @cached_property
    def _whole(self) -> dict[str, frozenset[str]]:
        return dict(self.unsplit)

    @cached_property
    def splitting(self) -> Rules:
        """The rules without mesh axes of size one, over which XLA would still emit collectives."""

        def real(names: MeshAxes) -> MeshAxes:
            return tuple(name for name in names if self.shape[name] > 1)

        return Rules(**{f.name: real(getattr(self.rules, f.name)) for f in fields(Rules)})

    def mesh_axes(self, axis: str | None) -> MeshAxes:
        """The mesh axes a logical axis really is split over."""
        return self.splitting.mesh_axes(axis)

    def shards(self, axis: str | None) -> int:
        """Into how many pieces a logical axis is split."""
        return math.prod(self.shape[name] for name in self.mesh_axes(axis))

    def dim(self, axis: str, size: int) -> Dim:
        """A dimension of ``size`` elements, padded at its end so that the axis splits evenly."""
        n = self.shards(axis)
        return Dim(axis, size, -(-size // n) * n)

    def heads(self, config: ModelConfig) -> Heads:
        """Which head is where (see `tpjax.parallel.dims.place_heads`)."""
        shards = self.shards("kv_heads")
        copies = self.shards("heads") // shards
        return place_heads(config.heads, config.kv_heads, shards, copies)

    def cached_per_token(self, config: ModelConfig) -> int:
        """Bytes of keys and values that a device keeps of one token, all layers."""
        held = 0  # heads
        for n in range(config.layers):
            here = self.at(f"blocks.{n}.attn")
            held += len(here.heads(config).kv) // here.shards("kv_heads")
            if not self.unsplit:  # then all layers are alike
                held *= config.layers
                break
        return held * config.kv_bytes_per_token // (config.layers * config.kv_heads)

    def sums(self, config: ModelConfig) -> list[tuple[str, frozenset[str]]]:
        """The all-reduces of a step: which module makes each, and over which mesh axes. The
        embedding has one, a layer two; of what is whole there is none."""
        found: list[tuple[str, Layout, tuple[str, ...]]]
        found = [("embed", self.at("embed"), ("vocab",))]
        for n in range(config.layers):
            found.append((f"blocks.{n}.attn", self.at(f"blocks.{n}.attn"), ("heads",)))
            if not config.is_sparse(n):
                found.append((f"blocks.{n}.mlp", self.at(f"blocks.{n}.mlp"), ("mlp",)))
                continue
            name = f"blocks.{n}.moe"
            here = self.at(name)
            found.append((name, here, ("experts", "expert_mlp")))
            assert config.moe is not None
            if config.moe.shared_mlp and not here.together:
                found.append((name, here, ("mlp",)))
        sums = [
            (module, frozenset(a for axis in axes for a in here.mesh_axes(axis)))
            for module, here, axes in found
        ]
        return [(module, over) for module, over in sums if over]

    @property
    def together(self) -> bool:
        """Whether the shared expert is split over the same devices as the others, so that one sum
        is enough for both."""
        experts = {*self.mesh_axes("experts"), *self.mesh_axes("expert_mlp")}
        return experts == set(self.mesh_axes("mlp"))

    @property
    def sharing(self) -> MeshAxes:
        """The mesh axes along which devices hold the same key/value heads."""
        kv = self.mesh_axes("kv_heads")
        return tuple(a for a in self.mesh_axes("heads") if a not in kv)


def bytes_summed(config: ModelConfig, module: str) -> int:
    """Bytes of one token that a module's all-reduce sums: of the embedding in the model's dtype, of
    products in float32."""
    if module == "embed":
        return (config.embed_in or config.embed) * itemsize(config.dtype)
    return 4 * config.embed


def module_of(path: str) -> str:
    """The module whose axes are split together: ``blocks.3.mlp`` of ``blocks.3.mlp.up.w``."""
    parts = path.split(".")
    return ".".join(parts[:3] if parts[0] == "blocks" else parts[:1])
