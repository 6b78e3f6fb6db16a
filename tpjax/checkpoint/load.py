"""Weights onto devices: every device's slice is read, checked, cast and put where it belongs.

Host memory in flight: on a CPU a few rows beyond the weights themselves; on an accelerator one
weight's slices on their way. No full copy of the model ever exists on the host.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from tpjax.checkpoint import orbax
from tpjax.checkpoint.orbax import OrbaxFolder, Verify
from tpjax.checkpoint.room import Empty, Room, aligned
from tpjax.checkpoint.safetensors import READABLE, SafetensorsFolder, TensorInfo
from tpjax.checkpoint.tensors import Bounds, Tensor, Tensors
from tpjax.errors import CheckpointError, UsageError, listing
from tpjax.models import Family
from tpjax.weights import WeightSpec, WeightTable

Progress = Callable[[Iterable[WeightSpec]], Iterable[WeightSpec]]
Source = SafetensorsFolder | OrbaxFolder
_THREADS = 4
_LARGE = 1 << 25  # bytes of a slice that are worth several threads


class Named(Protocol):
    """What can be checked against a table: tensors, and what ours are called there."""

    folder: Path
    tensors: dict[str, TensorInfo]

    def key(self, tensor: Tensor) -> str: ...


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


def all_bfloat16(source: Source) -> bool:
    """Whether every tensor that is a matrix is stored as bfloat16."""
    matrices = [info for info in source.tensors.values() if len(info.shape) > 1]
    return all(READABLE.get(info.dtype) == "bfloat16" for info in matrices)


def load(
    table: WeightTable, family: Family, source: Source, progress: Progress = iter
) -> tuple[jax.Array, ...]:
    """The flat leaves of ``table``, from a checkpoint that has exactly these weights.

    Raises CheckpointError listing every missing, extra, mis-shaped or unreadable tensor before
    anything is read, and naming the weight that holds a NaN or an infinity.
    """
    tensors = check(table, family, source)
    _check_tied_copy(tensors, source)
    empty = _room(table)
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        leaves = tuple(put(spec, source, tensors, pool, empty) for spec in progress(table.specs))
    source.check_unchanged()
    return leaves


def check(table: WeightTable, family: Family, source: Named) -> Tensors:
    """The tensors of this model, all of which the checkpoint has; nothing is read."""
    stored = source.tensors
    tensors = Tensors(table, family, stored)
    wanted = {source.key(tensor): tensor for tensor in tensors.all}
    problems = []
    missing = [name for name in wanted if name not in stored]
    if missing:
        problems.append(f"missing {listing(missing)}")
    allowed = wanted.keys() | {tensors.tied}
    extra = [n for n in stored if n not in allowed and not tensors.family.ignores(n)]
    if extra:
        problems.append(f"not part of this model: {listing(sorted(extra))}")
    shapes = [
        f"{name} is {list(stored[name].shape)}, the config says {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    if shapes:
        problems.append(f"wrong shape: {listing(shapes, 4)}")
    needed = [n for n in wanted if n in stored]
    unreadable = [f"{n} is {stored[n].dtype}" for n in needed if stored[n].dtype not in READABLE]
    if unreadable:
        known = ", ".join(READABLE)
        problems.append(f"stored as {listing(unreadable)}: readable are {known}, convert it")
    if problems:
        problems.append("config.json and weights must be of one model")
        raise CheckpointError(f"{source.folder}: {'; '.join(problems)}")
    return tensors


def tied_copy(tensors: Tensors, source: Named) -> tuple[str, str] | None:
    """The names of a second copy of the embedding, which some files hold, and of the embedding."""
    if tensors.tied is None or tensors.tied not in source.tensors:
        return None
    return tensors.tied, tensors.family.name("embed.w")


def differs(source: Named, copy: str, original: str) -> CheckpointError:
    """What to say of a tied copy that is none: transformers then would not tie."""
    return CheckpointError(
        f"{source.folder}: config.json says that {copy} is {original} (tie_word_embeddings), but"
        " the file holds other values; set tie_word_embeddings to false if they are meant"
    )


def _check_tied_copy(tensors: Tensors, source: Source) -> None:
    found = tied_copy(tensors, source)
    if found is None:
        return
    copy, original = found
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


def _room(table: WeightTable) -> Empty:
    """Where slices are made: on a CPU where they will stay."""
    if table.plan.platform != "cpu":
        return aligned
    try:
        return Room([nbytes(spec, part) for spec in table.specs for part in slices(spec)]).empty
    except OSError:  # not so much at once
        return aligned


def slices(spec: WeightSpec) -> dict[Bounds, list[Any]]:
    """The distinct slices of a weight, and the devices that hold each."""
    devices_of: dict[Bounds, list[Any]] = {}
    for device, index in spec.sharding.addressable_devices_indices_map(spec.shape).items():
        assert index is not None
        key = tuple(s.indices(n)[:2] for s, n in zip(index, spec.shape, strict=True))
        devices_of.setdefault(key, []).append(device)
    return devices_of


def nbytes(spec: WeightSpec, bounds: Bounds) -> int:
    return math.prod(_shape(bounds)) * spec.dtype.itemsize


def _shape(bounds: Bounds) -> tuple[int, ...]:
    return tuple(b - a for a, b in bounds)


def put(
    spec: WeightSpec, source: Source, tensors: Tensors, pool: Executor, empty: Empty = aligned
) -> jax.Array:
    """One weight on its devices. Slices that several devices share are read once."""
    devices_of = slices(spec)
    parts = {bounds: empty(_shape(bounds), spec.dtype) for bounds in devices_of}
    jobs = [
        job
        for bounds, out in parts.items()
        for job in _jobs(spec, source, tensors, bounds, out, len(parts))
    ]
    list(pool.map(lambda job: _read(source, *job), jobs))
    return _placed(spec, parts, devices_of)


def _placed(spec: WeightSpec, parts: dict[Bounds, np.ndarray], devices_of) -> jax.Array:
    """The weight made of these slices, once it is there: that bounds what is in flight."""
    arrays = [jax.device_put(parts[key], d) for key, devices in devices_of.items() for d in devices]
    whole = jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, arrays)
    return jax.block_until_ready(whole)


def read_slice(spec: WeightSpec, source: Source, tensors: Tensors, bounds: Bounds) -> np.ndarray:
    """``bounds`` of one weight in its final dtype."""
    out = aligned(_shape(bounds), spec.dtype)
    for job in _jobs(spec, source, tensors, bounds, out, _THREADS):
        _read(source, *job)
    return out


def _jobs(
    spec: WeightSpec, source: Source, tensors: Tensors, bounds: Bounds, out: np.ndarray, others: int
) -> Iterator[tuple[str, Bounds, np.ndarray]]:
    """What fills one slice: (tensor, what of it, where to), in enough pieces for all threads where
    it is large. Padding, which no checkpoint has, is zero."""
    pieces = list(tensors.pieces(spec, bounds))
    if sum(out[where].size for _, _, where in pieces) < out.size:
        out[...] = 0
    for tensor, stored, where in pieces:
        name, target = source.key(tensor), out[where]
        for piece, inside in _pieces(stored, source.grain(name), target.nbytes, others):
            yield name, piece, target[inside]


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


def _read(source: Source, name: str, bounds: Bounds, out: np.ndarray) -> None:
    """Read ``bounds`` of one tensor into ``out``, cast and checked, piece by piece."""
    kept = READABLE[source.tensors[name].dtype] in (out.dtype.name, *_WITHIN[out.dtype.name])
    for where, part in source.parts(name, bounds, out):
        target = out[where]
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
    empty = _room(table)

    def make(spec: WeightSpec) -> jax.Array:
        scaled = (block * np.float32(1 / math.sqrt(spec.shape[-1]))).astype(spec.dtype)
        devices_of = slices(spec)
        parts = {bounds: empty(_shape(bounds), spec.dtype) for bounds in devices_of}
        for part in parts.values():
            if part.ndim > 1:
                _repeat(scaled, part.reshape(-1))
            else:
                part[...] = 1
        return _placed(spec, parts, devices_of)

    return tuple(make(spec) for spec in progress(table.specs))


def _repeat(block: np.ndarray, target: np.ndarray) -> None:
    """Fill ``target`` with the block over and over."""
    for start in range(0, target.size, block.size):
        part = target[start : start + block.size]
        part[...] = block[: part.size]
