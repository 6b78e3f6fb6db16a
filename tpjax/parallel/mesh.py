"""The named device mesh: made, fitted to a model, drawn. `degrees` says what its axes are."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tpjax.config import ModelConfig
from tpjax.errors import ResourceError, UsageError
from tpjax.parallel.degrees import AXES, even_degrees, words
from tpjax.parallel.dims import Heads, MeshAxes


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


def largest_degree(config: ModelConfig, replicas: int = 1, expert: int = 1) -> tuple[int, int]:
    """The largest even tensor degree on all devices of this process, or 1 if none is even, and how
    many devices there are for it."""
    each = max(1, len(jax.devices()) // (replicas * expert))
    return max((d for d in even_degrees(config, expert) if d <= each), default=1), each


def reshaped(mesh: Mesh, sizes: Sequence[int]) -> Mesh:
    """The same devices in the same order, on axes of other sizes."""
    grid = mesh.devices.reshape(tuple(sizes))
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


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
