"""The named device mesh, and which tensor degrees a model allows on it.

Axes: ``data`` (replicas of the model that share the batch), ``tensor`` (heads, MLP width and
vocabulary are split over it) and ``rep``: when there are more devices than key/value heads, each
key/value head lives on ``rep`` devices while query heads, MLP and vocabulary are split over
``tensor`` x ``rep``.
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tpjax.config import ModelConfig
from tpjax.errors import ResourceError, UsageError

AXES = ("data", "tensor", "rep")


def make_mesh(data: int = 1, tensor: int = 1, rep: int = 1, devices=None) -> Mesh:
    """A mesh of ``data * tensor * rep`` devices with explicit axes.

    Raises UsageError for a size that is no whole number from 1 up, and ResourceError when there are
    too few devices.
    """
    sizes = dict(zip(AXES, (data, tensor, rep), strict=True))
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
            f"mesh data={data} x tensor={tensor} x rep={rep} needs {needed} devices,"
            f" {len(devices)} {kind} device(s) found{hint}"
        )
    grid = np.array(devices[:needed], dtype=object).reshape(data, tensor, rep)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def tensor_degree(mesh: Mesh) -> int:
    """Devices that one replica of the model is spread over."""
    check_axes(mesh)
    return mesh.shape["tensor"] * mesh.shape["rep"]


def check_axes(mesh: Mesh) -> None:
    """Raise UsageError for a mesh whose axes are not `AXES`, in that order."""
    if not isinstance(mesh, Mesh):
        raise UsageError(f"mesh={mesh!r}: make it with tpjax.make_mesh")
    if mesh.axis_names != AXES:
        raise UsageError(f"mesh axes {mesh.axis_names}: make it with tpjax.make_mesh, axes {AXES}")


def refusal(config: ModelConfig, tensor: int, rep: int) -> str | None:
    """Why ``tensor`` x ``rep`` cannot hold this model, or None if it can."""
    degree = tensor * rep
    if config.heads % degree:
        return f"heads={config.heads} cannot be split over tensor={tensor} x rep={rep}"
    if config.kv_heads % tensor:
        return f"kv_heads={config.kv_heads} cannot be split over tensor={tensor}"
    if rep > 1 and tensor != config.kv_heads:
        return (
            f"rep={rep} copies key/value heads, but tensor={tensor} still leaves"
            f" {config.kv_heads // tensor} of kv_heads={config.kv_heads} on each device"
        )
    if config.mlp % degree:
        return f"mlp={config.mlp} cannot be split over tensor={tensor} x rep={rep}"
    return None


def split(config: ModelConfig, degree: int) -> tuple[int, int]:
    """``degree`` devices as (tensor, rep): key/value heads are split first, then repeated."""
    if degree > config.kv_heads and degree % config.kv_heads == 0:
        return config.kv_heads, degree // config.kv_heads
    return degree, 1


def allowed_degrees(config: ModelConfig) -> list[int]:
    """Every tensor degree this model runs at, smallest first."""
    return [d for d in range(1, config.heads + 1) if refusal(config, *split(config, d)) is None]


def largest_degree(config: ModelConfig, data: int = 1) -> tuple[int, int]:
    """The largest tensor degree this model allows on all devices of this process, and how many of
    them there are for each of ``data`` replicas."""
    each = max(1, len(jax.devices()) // data)
    return max(d for d in allowed_degrees(config) if d <= each), each


def fit(mesh: Mesh, config: ModelConfig) -> Mesh:
    """The mesh this model runs on: the given one, with ``tensor`` split into ``tensor`` x ``rep``
    where there are more devices than key/value heads.

    Raises UsageError naming the numbers that disagree and the nearest degrees that work.
    """
    check_axes(mesh)
    tensor, rep = mesh.shape["tensor"], mesh.shape["rep"]
    if rep == 1:
        tensor, rep = split(config, tensor)
    why = refusal(config, tensor, rep)
    if why is None:
        shape = (mesh.shape["data"], tensor, rep)
        return Mesh(mesh.devices.reshape(shape), AXES, axis_types=(AxisType.Explicit,) * 3)
    degree, good = tensor * rep, allowed_degrees(config)
    below = [d for d in good if d <= degree][-1:]
    above = [d for d in good if d > degree][:1]
    near = " or ".join(str(d) for d in below + above)
    raise UsageError(f"{why}: the nearest tensor degrees that work are {near}")


def picture(mesh: Mesh, config: ModelConfig) -> str:
    """Which device holds which heads, one line per device."""
    data, tensor, rep = (mesh.shape[a] for a in AXES)
    heads, kv = config.heads // (tensor * rep), config.kv_heads // tensor

    def span(first: int, count: int) -> str:
        return f"{first}" if count == 1 else f"{first}-{first + count - 1}"

    title = f"mesh data={data} x tensor={tensor} x rep={rep}"
    if rep > 1:
        title += f" (each of kv_heads={config.kv_heads} on {rep} devices)"
    lines = [title]
    for (d, t, r), device in np.ndenumerate(mesh.devices):
        where = f"data {d}  " if data > 1 else ""
        lines.append(
            f"  {device.platform}:{device.id:<3} {where}tensor {t}"
            + (f"  rep {r}" if rep > 1 else "")
            + f"  heads {span((t * rep + r) * heads, heads):>7}  kv {span(t * kv, kv)}"
        )
    return "\n".join(lines)
