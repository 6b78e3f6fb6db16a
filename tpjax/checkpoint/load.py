"""Weights onto devices: every device's slice is read, checked, cast and put where it belongs.

Host memory in flight: on a CPU a few rows beyond the weights themselves; on an accelerator one
weight's slices on their way. No full copy of the model ever exists on the host.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from tpjax.checkpoint.safetensors import READABLE, SafetensorsFolder
from tpjax.errors import CheckpointError, listing
from tpjax.models import Family
from tpjax.weights import WeightSpec, WeightTable

Progress = Callable[[Iterable[WeightSpec]], Iterable[WeightSpec]]
_CHUNK = 1 << 21  # elements read, cast and checked together: at most 24 MB with both dtypes


def load(
    table: WeightTable, family: Family, source: SafetensorsFolder, progress: Progress = iter
) -> tuple[jax.Array, ...]:
    """The flat leaves of ``table``, from a checkpoint that has exactly these weights.

    Raises CheckpointError listing every missing, extra, mis-shaped or unreadable tensor before
    anything is read, and naming the weight that holds a NaN or an infinity.
    """
    names = check(table, family, source)
    return tuple(put(spec, source, names[spec.path]) for spec in progress(table.specs))


def check(table: WeightTable, family: Family, source: SafetensorsFolder) -> dict[str, str]:
    """Our path -> the checkpoint's name, for every weight; nothing is read."""
    names = {spec.path: family.source(spec.path) for spec in table.specs}
    stored = source.tensors
    problems = []
    missing = [name for name in names.values() if name not in stored]
    if missing:
        problems.append(f"missing {listing(missing)}")
    allowed = set(names.values())
    if table.config.tie_embeddings:
        allowed.add(family.names["head"])  # some files hold the tied copy too
    extra = [n for n in stored if n not in allowed and not n.endswith(family.ignored)]
    if extra:
        problems.append(f"not part of this model: {listing(sorted(extra))}")
    shapes = [
        f"{names[s.path]} is {list(stored[names[s.path]].shape)}, the config says {list(s.stored)}"
        for s in table.specs
        if names[s.path] in stored and stored[names[s.path]].shape != s.stored
    ]
    if shapes:
        problems.append(f"wrong shape: {listing(shapes, 4)}")
    needed = [n for n in names.values() if n in stored]
    unreadable = [f"{n} is {stored[n].dtype}" for n in needed if stored[n].dtype not in READABLE]
    if unreadable:
        known = ", ".join(READABLE)
        problems.append(f"stored as {listing(unreadable)}: readable are {known}, convert it")
    if problems:
        problems.append("config.json and weights must be of one model")
        raise CheckpointError(f"{source.folder}: {'; '.join(problems)}")
    return names


def put(spec: WeightSpec, source: SafetensorsFolder, name: str) -> jax.Array:
    """One weight on its devices. Slices that several devices share are read once."""
    devices_of: dict[tuple, list] = {}
    for device, index in spec.sharding.addressable_devices_indices_map(spec.shape).items():
        assert index is not None
        key = tuple(s.indices(n)[:2] for s, n in zip(index, spec.shape, strict=True))
        devices_of.setdefault(key, []).append(device)
    with ThreadPoolExecutor(max_workers=min(4, len(devices_of))) as pool:
        parts = list(pool.map(lambda bounds: read_slice(spec, source, name, bounds), devices_of))
    arrays = [
        jax.device_put(part, device)
        for part, devices in zip(parts, devices_of.values(), strict=True)
        for device in devices
    ]
    whole = jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, arrays)
    return jax.block_until_ready(whole)  # bounds what is in flight to this one weight


def read_slice(
    spec: WeightSpec, source: SafetensorsFolder, name: str, bounds: tuple[tuple[int, int], ...]
) -> np.ndarray:
    """``bounds`` of one weight in its final dtype, filled a few rows at a time.

    The buffer is aligned so that a CPU device takes it over as it is: there, nothing but these rows
    is ever in memory twice.
    """
    out = _aligned(tuple(b - a for a, b in bounds), spec.dtype)
    # Padding, rows that no checkpoint has, is zero; a device may hold nothing else.
    stored = [(a, min(b, n)) for (a, b), n in zip(bounds, spec.stored, strict=True)]
    counts = [max(0, b - a) for a, b in stored]
    if tuple(counts) != out.shape:
        out[...] = 0
    (first, *_), rows = stored[0], counts[0]
    others = tuple(slice(a, b) for a, b in stored[1:])
    step = max(1, _CHUNK // max(1, math.prod(counts[1:])))
    for row in range(0, rows if all(counts) else 0, step):
        end = min(row + step, rows)
        part = source.read(name, (slice(first + row, first + end), *others))
        target = out[(slice(row, end), *(slice(0, n) for n in counts[1:]))]
        cast_into(target, part)
        # Nothing overflows float32, so there the stored half is looked at, which is less.
        if not all_finite(part if spec.dtype == np.float32 else target):
            what = "holds a NaN or an infinity; download it again"
            if all_finite(part):
                what = f"is too large for {spec.dtype.name}; use dtype=bfloat16 or float32"
            raise CheckpointError(f"{source.tensors[name].file}: {name} {what}")
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype, boundary: int = 64) -> np.ndarray:
    """An uninitialised array that begins on a multiple of ``boundary`` bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + boundary, np.uint8)
    start = -raw.ctypes.data % boundary
    return raw[start : start + size].view(dtype).reshape(shape)


def all_finite(x: np.ndarray) -> bool:
    """Whether no element is NaN or infinite, told by the exponent bits (fast for bfloat16 too)."""
    mask = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}[x.dtype.name]
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    mask = unsigned.type(mask)
    return not ((x.view(unsigned) & mask) == mask).any()


def cast_into(target: np.ndarray, x: np.ndarray) -> None:
    """Write ``x`` in the target's dtype, rounding to nearest even; bfloat16 to float32 is a shift
    of the bits. What overflows becomes infinite, for the caller to refuse."""
    if x.dtype.name == "bfloat16" and target.dtype == np.float32:
        np.left_shift(x.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            target[...] = x


def random(table: WeightTable, seed: int = 0, progress: Progress = iter) -> tuple[jax.Array, ...]:
    """Random weights of a plausible scale, for measuring: each matrix repeats one random block, so
    that making a billion of them takes seconds. Not for judging text."""
    block = np.random.default_rng(seed).standard_normal(1 << 20, np.float32)

    def make(spec: WeightSpec) -> jax.Array:
        scale = np.float32(1 / math.sqrt(spec.shape[-1]))

        def part(index):
            shape = tuple(len(range(*s.indices(n))) for s, n in zip(index, spec.shape, strict=True))
            if len(spec.shape) == 1:
                return np.ones(shape, spec.dtype)
            return np.resize((block * scale).astype(spec.dtype), shape)

        return jax.block_until_ready(jax.make_array_from_callback(spec.shape, spec.sharding, part))

    return tuple(make(spec) for spec in progress(table.specs))
