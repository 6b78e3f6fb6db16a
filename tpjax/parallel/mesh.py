"""The named device mesh, and how a model's heads are spread over it at any degree.

Axes: ``data`` (replicas of the model that share the batch), ``expert`` (whole experts are placed
over it; everything else is split over it as over ``tensor``), ``tensor`` (heads, MLP width and
vocabulary are split over it) and ``rep``: devices that share a key/value head, while query heads,
MLP and vocabulary are split over all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tpjax.config import ModelConfig
from tpjax.errors import ResourceError, UsageError
from tpjax.parallel.dims import Heads, place_heads
from tpjax.parallel.rules import MeshAxes

AXES = ("data", "expert", "tensor", "rep")


def make_mesh(data: int = 1, tensor: int = 1, rep: int = 1, expert: int = 1, devices=None) -> Mesh:
    """A mesh of ``data * expert * tensor * rep`` devices with explicit axes.

    Raises UsageError for a size that is no whole number from 1 up, and ResourceError when there are
    too few devices.
    """
    sizes = dict(zip(AXES, (data, expert, tensor, rep), strict=True))
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < 1:
            raise UsageError(f"mesh axis {name}={size!r}: sizes are whole numbers, 1 or more")
    needed = math.prod(sizes.values())
    devices = jax.devices() if devices is None else list(devices)
    if needed > len(devices):
        kind = devices[0].platform if devices else "no"
        hint = (
            f"; on a CPU force them with --devices {needed}, or jax.config.update("
            f'"jax_num_cpu_devices", {needed}) before the first use of jax'
            if kind == "cpu"
            else ""
        )
        raise ResourceError(
            f"mesh {words(sizes)} needs {needed} devices,"
            f" {len(devices)} {kind} device(s) found{hint}"
        )
    grid = np.array(devices[:needed], dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def words(sizes) -> str:
    """``data=1 x tensor=4 x rep=2``; ``expert`` only where it is used."""
    return " x ".join(f"{a}={sizes[a]}" for a in AXES if a != "expert" or sizes[a] > 1)


def tensor_degree(mesh: Mesh) -> int:
    """Devices that one replica of the model is spread over."""
    check_axes(mesh)
    return mesh.size // mesh.shape["data"]


def check_axes(mesh: Mesh) -> None:
    """Raise UsageError for a mesh whose axes are not `AXES`, in that order."""
    if not isinstance(mesh, Mesh):
        raise UsageError(f"mesh={mesh!r}: make it with tpjax.make_mesh")
    if mesh.axis_names != AXES:
        raise UsageError(f"mesh axes {mesh.axis_names}: make it with tpjax.make_mesh, axes {AXES}")


@dataclass(frozen=True)
class Spread:
    """How the devices of one replica hold the heads: ``kv`` mesh axes split key/value heads, the
    devices along ``copies`` share one and split its query heads."""

    tensor: int
    rep: int
    kv: MeshAxes
    copies: MeshAxes


def spread(config: ModelConfig, expert: int, tensor: int, rep: int) -> Spread:
    """The best of the ways to hold the heads on this many devices: that with the fewest heads on
    each, where key/value heads count twice, for their projections and for the cache. With ``rep``
    given, it stays; else ``tensor`` may be split into ``tensor`` x ``rep``."""
    degree = tensor * rep

    def ways():
        for t in (tensor,) if rep > 1 else (d for d in range(1, degree + 1) if degree % d == 0):
            yield Spread(t, degree // t, ("expert", "tensor"), ("rep",)), expert * t
            if expert > 1:
                yield Spread(t, degree // t, ("tensor",), ("rep", "expert")), t

    def cost(way: tuple[Spread, int]):
        kv = -(-config.kv_heads // way[1])
        copies = expert * degree // way[1]
        queries = kv * -(-(config.heads // config.kv_heads) // copies)
        return queries + 2 * kv, kv, copies

    return min(ways(), key=cost)[0]


def refusal(config: ModelConfig, expert: int, tensor: int, rep: int) -> str | None:
    """Why these axes make no sense for this model, or None if they do."""
    if expert > 1 and config.moe is None:
        return f"expert={expert}: {config.family} has no experts; use tensor"
    if config.moe is not None and expert > config.moe.experts:
        return f"expert={expert} is more than the {config.moe.experts} experts"
    degree = expert * tensor * rep
    if degree > config.heads:
        return f"{degree} devices are more than heads={config.heads}"
    return None


def even_degrees(config: ModelConfig) -> list[int]:
    """The tensor degrees at which nothing is padded but the vocabulary, smallest first."""
    return [d for d in range(1, config.heads + 1) if _even(config, d)]


def _even(config: ModelConfig, degree: int) -> bool:
    best = spread(config, 1, degree, 1)
    heads = place_heads(config.heads, config.kv_heads, best.tensor, best.rep)
    widths = {config.mlp} | ({config.moe.mlp} if config.moe else set())
    return -1 not in heads.queries + heads.kv and not any(width % degree for width in widths)


def largest_degree(config: ModelConfig, data: int = 1) -> tuple[int, int]:
    """The largest even tensor degree on all devices of this process, and how many of them there
    are for each of ``data`` replicas."""
    each = max(1, len(jax.devices()) // data)
    return max(d for d in even_degrees(config) if d <= each), each


def fit(mesh: Mesh, config: ModelConfig) -> tuple[Mesh, Spread]:
    """The mesh this model runs on, and how it holds the heads: the given one, with ``tensor`` split
    into ``tensor`` x ``rep`` where that puts fewer heads on each device.

    Raises UsageError naming the numbers that disagree and the nearest degrees that work.
    """
    check_axes(mesh)
    data, expert, tensor, rep = (mesh.shape[a] for a in AXES)
    if why := refusal(config, expert, tensor, rep):
        raise UsageError(f"{why}: {_nearest(config, expert)}")
    best = spread(config, expert, tensor, rep)
    grid = mesh.devices.reshape(data, expert, best.tensor, best.rep)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES)), best


def _nearest(config: ModelConfig, expert: int) -> str:
    """The nearest degree that works, as something one can type."""
    most = config.moe.experts if config.moe else 1
    expert = min(expert, most, config.heads)
    tensor = config.heads // expert
    if expert == 1:
        return f"the nearest tensor degree that works is {tensor}"
    return f"the nearest that works is expert={expert} x tensor={tensor}"


def picture(mesh: Mesh, heads: Heads, sharing: MeshAxes) -> str:
    """Which device holds which heads, one line per device; those along the axes ``sharing`` have
    the same key/value heads."""
    copies = math.prod(mesh.shape[a] for a in sharing)
    title = "mesh " + words(mesh.shape)
    if copies > 1:
        title += f" (each key/value head on {copies} devices)"
    splitting = [a for a in AXES[1:] if a not in sharing]
    lines = [title]
    for at, device in np.ndenumerate(mesh.devices):
        where: dict[str, int] = dict(zip(AXES, at, strict=True))
        shard = _index(mesh, splitting, where)
        copy = _index(mesh, sharing, where)
        queries = _part(heads.queries, shard * copies + copy, tensor_degree(mesh))
        shown = [a for a in where if mesh.shape[a] > 1 or a == "tensor"]
        axes = "  ".join(f"{a} {where[a]}" for a in shown)
        kv = _part(heads.kv, shard, tensor_degree(mesh) // copies)
        lines.append(f"  {device.platform}:{device.id:<3} {axes}  heads {queries:>7}  kv {kv}")
    return "\n".join(lines)


def _index(mesh: Mesh, axes: Sequence[str], where: dict[str, int]) -> int:
    index = 0
    for axis in axes:
        index = index * mesh.shape[axis] + where[axis]
    return index


def _part(places: tuple[int, ...], index: int, parts: int) -> str:
    """The heads in one of equal parts, as runs: ``0-3``; a ``-`` is none."""
    size = len(places) // parts
    mine = [h for h in places[index * size : (index + 1) * size] if h >= 0]
    starts = [h for h in mine if h - 1 not in mine]
    ends = [h for h in mine if h + 1 not in mine]
    runs = zip(starts, ends, strict=True)
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or "-"
