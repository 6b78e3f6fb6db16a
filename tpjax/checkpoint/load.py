"""Weights onto devices: every device's slice is read, checked, cast and put where it belongs.

Host memory in flight: on a CPU a few rows beyond the weights themselves; on an accelerator one
weight's slices on their way. No full copy of the model ever exists on the host.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from tpjax.checkpoint import orbax
from tpjax.checkpoint.orbax import Bounds, OrbaxFolder, Verify
from tpjax.checkpoint.safetensors import READABLE, SafetensorsFolder, TensorInfo
from tpjax.errors import CheckpointError, UsageError, listing
from tpjax.models import Family
from tpjax.weights import WeightSpec, WeightTable

Progress = Callable[[Iterable[WeightSpec]], Iterable[WeightSpec]]
Source = SafetensorsFolder | OrbaxFolder
_THREADS = 4
_LARGE = 1 << 25  # bytes of a slice that are worth several threads


class Named(Protocol):
    """What can be checked against a table: tensors, and what our weights are called there."""

    folder: Path
    tensors: dict[str, TensorInfo]

    def name(self, family: Family, path: str) -> str: ...


def open_source(folder: Path, verify: Verify | None = None) -> Source:
    """The weights of a folder of either format. ``verify`` (see `OrbaxFolder`) is for tpjax
    checkpoints: safetensors files have nothing to be compared with, so there it is refused."""
    if orbax.is_checkpoint(folder):
        return OrbaxFolder(folder, verify or "fast")
    if verify is not None:
        orbax.check_verify(verify)
        raise UsageError(
            f"{folder}: verify={verify!r} needs a tpjax checkpoint, with digests; make one with"
            " tpjax-checkpoint convert"
        )
    return SafetensorsFolder(folder)


def load(
    table: WeightTable, family: Family, source: Source, progress: Progress = iter
) -> tuple[jax.Array, ...]:
    """The flat leaves of ``table``, from a checkpoint that has exactly these weights.

    Raises CheckpointError listing every missing, extra, mis-shaped or unreadable tensor before
    anything is read, and naming the weight that holds a NaN or an infinity.
    """
    names = check(table, family, source)
    _check_tied_copy(table, family, source)
    leaves = tuple(put(spec, source, names[spec.path]) for spec in progress(table.specs))
    source.check_unchanged()
    return leaves


def check(table: WeightTable, family: Family, source: Named) -> dict[str, str]:
    """Our path -> the checkpoint's name, for every weight; nothing is read."""
    names = {spec.path: source.name(family, spec.path) for spec in table.specs}
    stored = source.tensors
    problems = []
    missing = [name for name in names.values() if name not in stored]
    if missing:
        problems.append(f"missing {listing(missing)}")
    allowed = set(names.values()) | {tied_copy(table, family, source)}
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


def tied_copy(table: WeightTable, family: Family, source: Named) -> str | None:
    """The checkpoint's name of a second copy of the embedding, which some files hold."""
    if not table.config.tie_embeddings:
        return None
    name = source.name(family, "head")
    return name if name in source.tensors else None


def differs(source: Named, copy: str, original: str) -> CheckpointError:
    """What to say of a tied copy that is none: transformers then would not tie."""
    return CheckpointError(
        f"{source.folder}: config.json says that {copy} is {original} (tie_word_embeddings), but"
        " the file holds other values; set tie_word_embeddings to false if they are meant"
    )


def _check_tied_copy(table: WeightTable, family: Family, source: Source) -> None:
    copy, original = tied_copy(table, family, source), source.name(family, "embed.w")
    if copy is None:
        return
    one, other = source.tensors[copy], source.tensors[original]
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        raise differs(source, copy, original)
    bounds = tuple((0, n) for n in one.shape)
    nothing = np.empty(0)
    for (_, a), (_, b) in zip(
        source.parts(copy, bounds, nothing), source.parts(original, bounds, nothing), strict=True
    ):
        assert a is not None and b is not None
        if a.tobytes() != b.tobytes():
            raise differs(source, copy, original)


def put(spec: WeightSpec, source: Source, name: str) -> jax.Array:
    """One weight on its devices. Slices that several devices share are read once."""
    devices_of: dict[tuple, list] = {}
    for device, index in spec.sharding.addressable_devices_indices_map(spec.shape).items():
        assert index is not None
        key = tuple(s.indices(n)[:2] for s, n in zip(index, spec.shape, strict=True))
        devices_of.setdefault(key, []).append(device)
    slices = {bounds: _empty(spec, bounds) for bounds in devices_of}
    jobs = [
        (piece, out[where])
        for bounds, out in slices.items()
        for piece, where in _pieces(bounds, source.grain(name), out.nbytes, len(slices))
    ]
    with ThreadPoolExecutor(max_workers=min(_THREADS, len(jobs))) as pool:
        list(pool.map(lambda job: _fill(spec, source, name, *job), jobs))
    arrays = [
        jax.device_put(part, device)
        for part, devices in zip(slices.values(), devices_of.values(), strict=True)
        for device in devices
    ]
    whole = jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, arrays)
    return jax.block_until_ready(whole)  # bounds what is in flight to this one weight


def read_slice(spec: WeightSpec, source: Source, name: str, bounds: Bounds) -> np.ndarray:
    """``bounds`` of one weight in its final dtype."""
    out = _empty(spec, bounds)
    _fill(spec, source, name, bounds, out)
    return out


def _empty(spec: WeightSpec, bounds: Bounds, boundary: int = 64) -> np.ndarray:
    """An uninitialised slice that begins on a multiple of ``boundary`` bytes, so that a CPU device
    takes it over as it is: there, nothing but a piece is ever in memory twice."""
    shape = tuple(b - a for a, b in bounds)
    size = math.prod(shape) * spec.dtype.itemsize
    raw = np.empty(size + boundary, np.uint8)
    start = -raw.ctypes.data % boundary
    return raw[start : start + size].view(spec.dtype).reshape(shape)


def _pieces(bounds: Bounds, grain: tuple[int, int], nbytes: int, others: int):
    """A slice as enough pieces for all threads, where it is large: (bounds, where in it).
    ``grain``: along which axis to divide it, and at multiples of what."""
    axis, width = grain
    low, high = bounds[axis]
    count = -(-_THREADS // others) if nbytes >= _LARGE else 1
    step = max(1, -(-(high - low) // (count * width))) * width
    cuts = [low, *range((low // width) * width + step, high, step), high]
    for begin, end in zip(cuts, cuts[1:], strict=False):
        where = [slice(None)] * len(bounds)
        where[axis] = slice(begin - low, end - low)
        yield (*bounds[:axis], (begin, end), *bounds[axis + 1 :]), tuple(where)


def _fill(spec: WeightSpec, source: Source, name: str, bounds: Bounds, out: np.ndarray) -> None:
    """Read ``bounds`` of one weight into ``out``, cast and checked, piece by piece."""
    # Padding, rows that no checkpoint has, is zero; a device may hold nothing else.
    stored = tuple((a, min(b, n)) for (a, b), n in zip(bounds, spec.stored, strict=True))
    counts = tuple(max(0, b - a) for a, b in stored)
    if counts != out.shape:
        out[...] = 0
    if not all(counts):
        return
    filled = out[tuple(slice(0, n) for n in counts)]
    kept = READABLE[source.tensors[name].dtype] in (spec.dtype.name, *_WITHIN[spec.dtype.name])
    for where, part in source.parts(name, stored, filled):
        target = filled[where]
        if part is not None:  # else it was read to where it belongs
            cast_into(target, part)
        if not (source.finite and kept):
            _refuse_nonfinite(target, part, source, name)


# What a cast cannot make infinite: stored dtypes, by the wanted one.
_WITHIN = {"float32": ("bfloat16", "float16"), "bfloat16": ("float16",), "float16": ()}


def _refuse_nonfinite(target: np.ndarray, part: np.ndarray | None, source: Source, name: str):
    part = target if part is None else part
    # Nothing overflows float32, so there the stored half is looked at, which is less.
    if all_finite(part if target.dtype == np.float32 else target):
        return
    what = "holds a NaN or an infinity; download it again"
    if all_finite(part):
        what = f"is too large for {target.dtype.name}; use dtype=bfloat16 or float32"
    raise CheckpointError(f"{source.tensors[name].file}: {name} {what}")


_EXPONENT = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
_BLOCK = 1 << 18  # elements looked at together: what stays in a core's cache


def all_finite(x: np.ndarray) -> bool:
    """Whether no element is NaN or infinite, told by the exponent bits (fast for bfloat16 too)."""
    flat = x.reshape(-1) if x.flags.c_contiguous else np.ascontiguousarray(x).reshape(-1)
    bits = flat.view(f"u{x.dtype.itemsize}")
    mask = bits.dtype.type(_EXPONENT[x.dtype.name])
    scratch = np.empty(min(_BLOCK, bits.size), bits.dtype)
    for i in range(0, bits.size, _BLOCK):
        part = bits[i : i + _BLOCK]
        if np.bitwise_and(part, mask, out=scratch[: part.size]).max() == mask:
            return False
    return True


def nonfinite(x: np.ndarray) -> int:
    """How many elements are NaN or infinite."""
    bits = x.reshape(-1).view(f"u{x.dtype.itemsize}")
    mask = bits.dtype.type(_EXPONENT[x.dtype.name])
    return 0 if all_finite(x) else int(((bits & mask) == mask).sum())


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
