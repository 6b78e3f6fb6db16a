"""Devices to compile for that need not be there: GPUs and TPUs by their compilers' descriptions,
CPU devices by forcing them."""

import importlib.util
import math
import warnings
from pathlib import Path

from tpjax import env
from tpjax.errors import ResourceError, UsageError
from tpjax.planner import chips

FOLDER = Path(__file__).with_name("targets")
# Chips of a slice -> its topology, as the TPU compiler calls it: two dimensions, or three.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_TPU = {
    "v5e": _FLAT,
    "v6e": _FLAT,
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"},
}


def devices(hardware: str) -> list:
    """The devices of ``h100:8``, ``h200:8x2``, ``cpu:8`` or ``v5e:8``. Raises UsageError for what
    no compiler here knows, ResourceError naming the extra to install where the compiler is absent.
    """
    kind, _, count = hardware.lower().partition(":")
    if kind == "cpu":
        if not count.isdigit() or int(count) < 1:
            raise UsageError(f"hardware {hardware!r}: write cpu:8")
        env.start(devices=int(count))
        import jax

        return jax.devices()[: int(count)]
    wanted = chips.parse(hardware)
    env.start()
    if wanted.chip.key in _TPU:
        return _tpu(wanted)
    file = FOLDER / f"{wanted.chip.target}.txtpb"
    if wanted.chip.target is None or not file.is_file():
        known = [key for key, chip in chips.chips().items() if _has_target(key, chip)]
        raise UsageError(
            f"hardware {hardware!r}: no compiler target for {wanted.chip.name}; audit knows"
            f" cpu, {', '.join(known)}"
        )
    if not any(_installed("jax_plugins", f"jax_plugins.xla_cuda{n}") for n in (12, 13)):
        raise ResourceError(
            f"hardware {hardware!r}: the compiler for NVIDIA GPUs is not installed;"
            ' pip install "tpjax[compile-cuda]"'
        )
    return _topology(
        "cuda", target_config=file.read_text(), topology=f"1x{wanted.nodes}x{wanted.devices}"
    )


def _installed(*modules: str) -> bool:
    """Whether these can be imported; a package comes before what is in it."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def _has_target(key: str, chip: chips.Chip) -> bool:
    return key in _TPU or (FOLDER / f"{chip.target}.txtpb").is_file()


def _tpu(wanted: chips.Hardware) -> list:
    key = wanted.chip.key
    if not _installed("libtpu"):
        raise ResourceError(
            f'hardware {key}: the compiler for TPUs is not installed; pip install "tpjax[tpu]"'
        )
    shape = _TPU[key].get(wanted.total)
    if shape is None:
        raise UsageError(
            f"hardware {key}:{wanted.total}: no slice has so many chips;"
            f" there are {', '.join(map(str, _TPU[key]))}"
        )
    env.compile_for_tpus()
    found = _topology("tpu", topology_name=f"{key}:{shape}")
    return found[: wanted.total]


def _topology(platform: str, topology_name: str = "", **about) -> list:
    from jax.experimental import topologies

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(topologies.get_topology_desc(topology_name, platform, **about).devices)


def degree(asked: dict[str, int | None], count: int, hardware: str) -> dict[str, int]:
    """Sizes of the mesh's axes; ``tensor`` takes what the others leave. Raises UsageError for a
    mesh that is not all of the devices."""
    given = {axis: size for axis, size in asked.items() if size}
    rest = math.prod(given.values())
    words = " x ".join(f"{axis}={size}" for axis, size in given.items())
    if count % rest or ("tensor" in given and rest != count):
        raise UsageError(f"{words} is not {hardware}: {rest} of {count} devices")
    return {"tensor": count // rest} | given
