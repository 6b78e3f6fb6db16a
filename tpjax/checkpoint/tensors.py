"""Which tensors a checkpoint holds for a model, and which part of which one a device's slice is.

A tensor is a weight; or several weights, its rows one after another (fused projections); or one
expert of a weight that holds them all.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from tpjax.models import Family
from tpjax.weights import WeightSpec, WeightTable

Bounds = tuple[tuple[int, int], ...]
Where = tuple[int | slice, ...]


@dataclass(frozen=True)
class Part:
    """A weight, or one expert of it, from row ``first`` of a tensor on."""

    spec: WeightSpec
    expert: int | None
    first: int


@dataclass(frozen=True)
class Tensor:
    """``path``: what tpjax checkpoints call it; ``name``: what the family's checkpoints do.
    ``split`` is the dimension that meshes may cut, None if there is none, and ``unit`` how many of
    its elements stay together: a head."""

    path: str
    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    split: int | None
    unit: int
    parts: tuple[Part, ...]

    @property
    def dtype(self) -> np.dtype:
        """What the model computes with."""
        return self.parts[0].spec.dtype

    @property
    def bytes_per_device(self) -> int:
        """What a device holds of it, padding included; of an expert, its share of all."""
        return sum(
            part.spec.bytes_per_device // (1 if part.expert is None else part.spec.stored[0])
            for part in self.parts
        )


class Tensors:
    """The tensors of one model in one family's checkpoints, in the order of its weights."""

    def __init__(self, table: WeightTable, family: Family, stored: Collection[str] = ()):
        """``stored``: names in the checkpoint at hand, which tell how it calls them."""
        family = family.as_in(stored)
        groups: dict[str, list[tuple[WeightSpec, int | None]]] = {}
        for spec in table.specs:
            name = family.name(spec.path)
            if "{expert}" in name:
                for n in range(spec.stored[0]):
                    groups.setdefault(name.replace("{expert}", str(n)), []).append((spec, n))
            else:
                groups.setdefault(name, []).append((spec, None))
        for members in groups.values():
            members.sort(key=lambda member: family.rank(member[0].path))
        self.table, self.family = table, family
        self.all = tuple(_tensor(name, members) for name, members in groups.items())
        self._of: dict[tuple[str, int | None], tuple[Tensor, int]] = {
            (part.spec.path, part.expert): (tensor, part.first)
            for tensor in self.all
            for part in tensor.parts
        }
        # A second copy of the embedding, which some files hold although it is tied.
        self.tied = family.name("head") if table.config.tie_embeddings else None

    def pieces(self, spec: WeightSpec, bounds: Bounds) -> Iterator[tuple[Tensor, Bounds, Where]]:
        """What to read for the slice ``bounds`` of a weight: the tensor, what of it, and where in
        the slice it belongs. What no piece covers is padding, zero."""
        runs = [list(d.runs(*b)) for d, b in zip(spec.dims, bounds, strict=True)]
        for chosen in _product(runs):
            where = tuple(
                slice(at - low, at - low + n)
                for (at, _, n), (low, _) in zip(chosen, bounds, strict=True)
            )
            stored = tuple((begin, begin + n) for _, begin, n in chosen)
            if (spec.path, None) in self._of:
                tensor, first = self._of[spec.path, None]
                (begin, end), *rest = stored
                yield tensor, ((begin + first, end + first), *rest), where
                continue
            (begin, end), *rest = stored
            for n in range(begin, end):
                tensor, _ = self._of[spec.path, n]
                yield tensor, tuple(rest), (where[0].start + n - begin, *where[1:])

    def slices(self, tensor: Tensor) -> set[Bounds]:
        """The parts of a tensor that the devices of the table's mesh read."""
        return {
            bounds
            for spec in {part.spec.path: part.spec for part in tensor.parts}.values()
            for held in device_bounds(spec)
            for read, bounds, _ in self.pieces(spec, held)
            if read is tensor
        }


def device_bounds(spec: WeightSpec) -> set[Bounds]:
    """The distinct slices of a weight that devices hold."""
    return {
        tuple(s.indices(n)[:2] for s, n in zip(index, spec.shape, strict=True))
        for index in spec.sharding.devices_indices_map(spec.shape).values()
        if index is not None
    }


def _tensor(name: str, members: list[tuple[WeightSpec, int | None]]) -> Tensor:
    spec, expert = members[0]
    path, parts, first = _path(members), [], 0
    for spec, expert in members:
        parts.append(Part(spec, expert, first))
        first += spec.stored[0]
    inside = spec.dims if expert is None else spec.dims[1:]
    shape = tuple(dim.stored for dim in inside)
    if len(members) > 1:
        shape = (first, *shape[1:])
    split = spec.split if expert is None else spec.split_inside
    unit = 1 if split is None else inside[split].unit
    axes = tuple(dim.axis for dim in inside)
    return Tensor(path, name, shape, axes, split, unit, tuple(parts))


def _path(members: list[tuple[WeightSpec, int | None]]) -> str:
    """``blocks.0.attn.q_k_v.w`` of a fused one, ``blocks.0.moe.gate.7`` of an expert."""
    columns = zip(*(spec.path.split(".") for spec, _ in members), strict=True)
    path = ".".join("_".join(dict.fromkeys(words)) for words in columns)
    expert = members[0][1]
    return path if expert is None else f"{path}.{expert}"


def _product(runs: list[list[tuple[int, int, int]]]) -> Iterator[tuple[tuple[int, int, int], ...]]:
    if not runs:
        yield ()
        return
    for one in runs[0]:
        for others in _product(runs[1:]):
            yield (one, *others)
