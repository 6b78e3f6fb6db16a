"""Convert: a Hugging Face checkpoint into a tpjax checkpoint, a few rows at a time.

Every weight is read once, in the order of the source's files; hashed, looked at, cast and cut while
it is in the processor's cache; written, synced, read back and compared. Memory in flight is
`Budget.bytes`, whatever the model.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import xxhash

from checkpoints_tools import orbax_files
from checkpoints_tools.digests import Digests
from checkpoints_tools.plan import Conversion, Item, plan
from checkpoints_tools.small_files import keep, read_small, with_dtype
from checkpoints_tools.sources import Headers, RowSource, blank_padding, stored_rows
from checkpoints_tools.staging import (
    Staging,
    check_dst,
    check_places,
    check_space,
    foreign,
    is_partial,
    named,
    partial_of,
    stage,
)
from checkpoints_tools.workers import Budget, Workers, divide
from tpjax import __version__
from tpjax.checkpoint.layout import NUMPY
from tpjax.checkpoint.load import all_finite, cast_into, differs, nonfinite
from tpjax.checkpoint.manifest import (
    MANIFEST,
    VERSION,
    WEIGHTS,
    FileInfo,
    Manifest,
    Source,
    Weight,
    weight_of,
)
from tpjax.checkpoint.orbax import OrbaxFolder, is_checkpoint
from tpjax.errors import CheckpointError, RunError, UsageError, listing

DEFAULT_GB = 1.0
OnBytes = Callable[[int], object]


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    data: int = 1,
    tensor: int = 1,
    rep: int = 1,
    max_host_gb: float = DEFAULT_GB,
    resume: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    on_total: OnBytes = lambda total: None,
    on_bytes: OnBytes = lambda count: None,
) -> dict:
    """Write the checkpoint ``src`` to ``dst``; returns what was done.

    ``max_host_gb``: bound on all buffers, in 10^9 bytes. ``resume`` goes on with what an earlier
    run has begun, or begins; ``overwrite`` replaces a tpjax checkpoint or a begun one. ``on_total``
    and ``on_bytes`` are told of source bytes. Raises UsageError, CheckpointError, ResourceError or
    RunError; ``dst`` then is what it was before.
    """
    if resume and overwrite:
        raise UsageError("--resume goes on and --overwrite starts again: give one of them")
    if dtype is not None and dtype not in NUMPY:
        raise UsageError(f"dtype={dtype!r}: known are {', '.join(NUMPY)}")
    if not 0 < max_host_gb < 1e6:
        raise UsageError(f"max_host_gb={max_host_gb}: give a number of GB above 0")
    dst = Path(os.path.realpath(os.path.expanduser(dst)))
    check_dst(dst)
    conversion = plan(src, dtype=dtype, data=data, tensor=tensor, rep=rep)
    if isinstance(conversion.source, Headers):
        raise UsageError(f"{src}: a config without weights can only be planned: add --dry-run")
    budget = conversion.budget(int(max_host_gb * 1e9))
    check_places(conversion.folder.path, dst)
    _already(conversion, dst, resume, overwrite)
    with stage(dst) as staging:
        if is_partial(dst) and not (resume or overwrite):
            raise UsageError(
                f"{partial_of(dst)}: an unfinished conversion; --resume goes on with it,"
                " --overwrite starts again"
            )
        # Looked at again: another process may have finished since, or a replacement been undone.
        if _already(conversion, dst, resume, overwrite):
            staging.remove()
            return _result(conversion, dst, 0, budget) | {"already_complete": True}
        done = _resumed(conversion, staging, dtype, resume, allow_nonfinite)
        if resume and staging.complete():
            try:
                OrbaxFolder(staging.path)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; --overwrite starts again") from error
            staging.commit(overwrite)
            return _result(conversion, dst, 0, budget)
        todo = [item for item in conversion.items if item.path not in done]
        check_space(dst, sum(item.layout.file_bytes for item in todo))
        on_total(sum(item.source_bytes for item in todo))
        copies = _copies(conversion, budget)
        job = _Job(conversion, staging, Workers(budget), allow_nonfinite, on_bytes)
        records = done | job.run(todo)
        _finish(conversion, staging, records, copies)
        staging.commit(overwrite)
    return _result(conversion, dst, len(todo), budget)


def _result(conversion: Conversion, dst: Path, converted: int, budget: Budget) -> dict:
    return {
        "checkpoint": str(dst),
        "weights": len(conversion.items),
        "converted_now": converted,
        "source_bytes": conversion.source_bytes,
        "bytes": conversion.bytes,
        "buffers_bytes": budget.bytes,
        "already_complete": False,
    }


def _already(conversion: Conversion, dst: Path, resume: bool, overwrite: bool) -> bool:
    """Whether ``dst`` is what this would make; refuses a checkpoint that must not be touched."""
    if not is_checkpoint(dst):
        return False
    if overwrite:
        try:
            known = list(Manifest.read(dst).files)
        except CheckpointError:  # damaged, which may be why it is to be replaced
            known = [path.name for path in dst.iterdir() if keep(path)]
        if others := foreign(dst, [*known, WEIGHTS]):
            raise UsageError(
                f"{dst}: holds {listing(others, 3)}, not of the checkpoint; move it, then"
                " --overwrite"
            )
        return False
    if resume:
        there, now = OrbaxFolder(dst).manifest, source_files(conversion)
        if changed := [name for name in now if there.source_files.get(name) != now[name]]:
            raise UsageError(
                f"{dst}: was made from another source, or it has changed since:"
                f" {listing(changed, 3)}; --overwrite replaces the checkpoint"
            )
        made = {(w.path, w.shape, w.dtype, w.source.name) for w in there.weights}
        wanted = {(i.path, i.layout.shape, i.layout.dtype, i.name) for i in conversion.items}
        if made == wanted:
            return True
    raise UsageError(f"{dst}: there is a checkpoint already; --overwrite replaces it")


def _about(conversion: Conversion, dtype: str | None) -> dict:
    """What a resumed run must have in common with the one before."""
    files = {name: list(of) for name, of in source_files(conversion).items()}
    return {"version": VERSION, "tpjax": __version__, "dtype": dtype, "files": files}


def source_files(conversion: Conversion) -> dict[str, tuple[int, int]]:
    """Size and modification time of what the weights come from."""
    folder, files = conversion.folder.path, {}
    for path in [folder / "config.json", *conversion.source.files]:
        stat = path.stat()
        files[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns)
    return files


def _resumed(
    conversion: Conversion,
    staging: Staging,
    dtype: str | None,
    resume: bool,
    allow_nonfinite: bool,
) -> dict[str, Weight]:
    """The weights an earlier run has written and compared, with their files in place."""
    wanted = {item.path: item for item in conversion.items}
    done = {}
    for record in staging.start(_about(conversion, dtype), resume):
        try:
            weight = weight_of(record)
            size = os.path.getsize(staging.path / weight.file)
        except (KeyError, TypeError, ValueError, OSError):
            continue
        item = wanted.get(weight.path)
        same = item is not None and weight.layout == item.layout
        if same and size == weight.layout.file_bytes and (weight.finite or allow_nonfinite):
            done[weight.path] = weight
    return done


class _Job:
    """The weights still to do, by a few workers."""

    def __init__(
        self, conversion: Conversion, staging: Staging, workers, allow_nonfinite, on_bytes
    ):
        self.conversion, self.staging, self.workers = conversion, staging, workers
        self.allow_nonfinite, self.on_bytes = allow_nonfinite, on_bytes

    def run(self, items: list[Item]) -> dict[str, Weight]:
        """Convert ``items`` in the order they lie in the source. The first error ends all of it."""
        items = sorted(items, key=lambda item: (str(item.info.file), item.info.offset))
        return {weight.path: weight for weight in self.workers.run(self._one, items)}

    def _one(self, item: Item, arena: np.ndarray) -> Weight:
        weight = self._write(item, arena)
        self._compare(item, weight, arena)
        self.staging.record(asdict(weight))
        return weight

    def _write(self, item: Item, arena: np.ndarray) -> Weight:
        """Source to file, rows by rows; every byte is on disk when this returns."""
        layout, source = item.layout, self.conversion.source
        folder = self.staging.path / WEIGHTS / item.path
        path = folder / layout.file
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            (folder / "zarr.json").write_bytes(layout.zarr_json)
            out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        original, digests, finite = xxhash.xxh3_128(), Digests(layout), True
        step, (raw, cast, cut) = divide(arena, layout.rows, *item.row_buffers)
        try:
            with source.rows(item.name) as read:
                for first in range(0, layout.rows, step):
                    self.workers.go_on()
                    count = min(step, layout.rows - first)
                    read(first, raw[:count])
                    original.update(raw[:count].reshape(-1).data)
                    rows = cast[:count] if item.casts else raw[:count]
                    finite &= self._cast(item, raw[:count], rows)
                    pieces = layout.cut(rows, cut.reshape(-1))
                    digests.add(rows, pieces)
                    with named(path):
                        _put(out, layout, first, count, pieces)
                    self.on_bytes(raw[:count].size)
            with named(path):
                for offset, zeros in layout.padding():
                    os.pwrite(out, zeros, offset)
                os.pwrite(out, layout.index, layout.data_bytes)
                os.fsync(out)
        finally:
            os.close(out)
        digest, chunks = digests.finish()
        file = str(item.info.file.relative_to(self.conversion.folder.path))
        return Weight(
            path=item.path,
            shape=layout.shape,
            dtype=layout.dtype,
            axes=item.tensor.axes,
            cut=(layout.axis, layout.width),
            source=Source(file, item.name, item.info.dtype, original.hexdigest()),
            digest=digest,
            chunks=chunks,
            finite=finite,
        )

    def _cast(self, item: Item, raw: np.ndarray, rows: np.ndarray) -> bool:
        """``raw`` in the dtype of the checkpoint; whether all of it is finite."""
        stored = raw.view(NUMPY[item.stored])
        finite = all_finite(stored)
        if not finite and not self.allow_nonfinite:
            raise CheckpointError(
                f"{item.info.file}: {item.name} holds a NaN or an infinity; download it again, or"
                " --allow-nonfinite"
            )
        if item.casts:
            target = rows.view(NUMPY[item.layout.dtype])
            cast_into(target, stored)
            if nonfinite(target) != (0 if finite else nonfinite(stored)):
                raise CheckpointError(
                    f"{item.info.file}: {item.name} is too large for {item.layout.dtype}; use"
                    " bfloat16 or float32"
                )
        return finite

    def _compare(self, item: Item, weight: Weight, arena: np.ndarray) -> None:
        """Read the file back, put the weight together again, and compare its digests."""
        layout, digests = item.layout, Digests(item.layout)
        step, (rows, cut) = divide(arena, layout.rows, *layout.row_buffers)
        with stored_rows(self.staging.path, weight, cut.reshape(-1)) as read:
            for first in range(0, layout.rows, step):
                part = rows[: layout.rows - first]
                read(first, part)
                digests.add(part, layout.cut(part, cut.reshape(-1)))
        same = digests.finish() == (weight.digest, weight.chunks)
        if not same or not blank_padding(self.staging.path, weight):
            raise RunError(
                f"{self.staging.path / weight.file}: {weight.path} was not read back as it was"
                " written; check the disk and the memory of this machine, then --resume"
            )


def _put(fd: int, layout, first: int, count: int, cut: np.ndarray) -> None:
    """Write the runs of some rows where they belong."""
    at = 0
    for _, offset, size in layout.runs(first, count):
        end = at + size
        while at < end:
            wrote = os.pwrite(fd, cut[at:end].data, offset)
            at, offset = at + wrote, offset + wrote


def _copies(conversion: Conversion, budget: Budget) -> dict[str, Source]:
    """The tied copies of the source, which must be equal to what they copy; looked at first."""
    source, found = conversion.source, {}
    for path, name in conversion.copies.items():
        info, item = source.tensors[name], next(i for i in conversion.items if i.path == path)
        if (info.shape, info.dtype) != (item.info.shape, item.info.dtype):
            raise differs(source, name, item.name)
        digest = _digest(source, item, name, budget)
        if digest != _digest(source, item, item.name, budget):
            raise differs(source, name, item.name)
        file = str(info.file.relative_to(conversion.folder.path))
        found[path] = Source(file, name, info.dtype, digest)
    return found


def _digest(source: RowSource, item: Item, name: str, budget: Budget) -> str:
    """Of a tensor of the shape and dtype of ``item``'s."""
    digest, arena = xxhash.xxh3_128(), np.empty(budget.arena, np.uint8)
    _, (buffer,) = divide(arena, item.layout.rows, item.source_row_bytes)
    with source.rows(name) as read:
        for first in range(0, item.layout.rows, len(buffer)):
            rows = buffer[: item.layout.rows - first]
            read(first, rows)
            digest.update(rows.reshape(-1).data)
    return digest.hexdigest()


def _finish(conversion: Conversion, staging: Staging, records, copies) -> None:
    """The files beside the weights, and the manifest."""
    weights = tuple(records[item.path] for item in conversion.items)
    small = orbax_files.metadata(weights)
    for item in conversion.items:
        small[f"{WEIGHTS}/{item.path}/zarr.json"] = item.layout.zarr_json
    for path in sorted(conversion.folder.path.iterdir()):
        if keep(path):
            small[path.name] = read_small(path)
    if any(item.casts for item in conversion.items):
        small["config.json"] = with_dtype(small["config.json"], weights[0].dtype)
    for name, content in small.items():
        staging.write(name, content)
    manifest = Manifest(
        tool=f"tpjax {__version__}",
        source=conversion.title,
        mesh=dict(conversion.table.plan.mesh.shape),
        weights=weights,
        files={
            name: FileInfo(len(content), xxhash.xxh3_128_hexdigest(content))
            for name, content in sorted(small.items())
        },
        source_files=source_files(conversion),
        copies=copies,
        left_out=conversion.left_out,
    )
    if staging.about != _about(conversion, staging.about["dtype"]):
        raise CheckpointError(
            f"{conversion.folder.path}: the source has changed while it was converted; --overwrite"
            " starts again"
        )
    staging.write(MANIFEST, manifest.sealed())
