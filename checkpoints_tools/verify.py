"""Verify: is a tpjax checkpoint, read as devices would read it, what its manifest says?

One pass: every weight's rows are put together from the slices of a mesh, hashed whole and chunk by
chunk, and compared. What is wrong is named by weight and file.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from checkpoints_tools.digests import Digests
from checkpoints_tools.plan import Conversion, Item, plan
from checkpoints_tools.small_files import keep, read_small
from checkpoints_tools.sources import Headers, blank_padding
from checkpoints_tools.workers import ARENA, Budget, Workers, divide
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint import load
from tpjax.checkpoint.layout import NUMPY
from tpjax.checkpoint.manifest import MANIFEST, NewerFormat, Weight
from tpjax.checkpoint.orbax import OrbaxFolder, is_checkpoint
from tpjax.checkpoint.tensors import Tensor, Tensors
from tpjax.errors import CheckpointError, UsageError
from tpjax.parallel.degrees import even_degrees
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan
from tpjax.weights import WeightTable

OnBytes = Callable[[int], object]
_BUDGET = Budget(workers=4, arena=ARENA)


def verify(
    dst: str | Path,
    *,
    against: str | Path | None = None,
    tensor: int | None = None,
    on_total: OnBytes = lambda total: None,
    on_bytes: OnBytes = lambda count: None,
) -> dict:
    """Everything that differs, as ``problems``, a line each: the manifest, files, sizes, every
    chunk, every weight read at ``tensor`` (by default another degree than it was planned for), and
    with ``against`` the source's tensors and files too.

    Raises CheckpointError for what is no tpjax checkpoint or of a newer format, and if ``against``
    cannot be read.
    """
    folder = Path(dst)
    if not is_checkpoint(folder):
        raise CheckpointError(f"{dst}: no {MANIFEST}; give a tpjax checkpoint")
    result = {"checkpoint": str(dst), "weights": 0, "files": 0, "tensor": tensor, "problems": []}
    try:
        source = OrbaxFolder(folder, verify=None)
    except NewerFormat:
        raise
    except CheckpointError as error:
        result["problems"].append(str(error))
        return result
    conversion = None
    if against is not None:
        conversion = plan(against)
        if isinstance(conversion.source, Headers):
            raise UsageError(f"{against}: a config.json has no weights to compare with")
    framed = {path: source.frame(weight) for path, weight in source.weights.items()}
    sound = {path for path, problem in framed.items() if problem is None}
    problems = [*source.check_files(), *filter(None, framed.values())]
    result["files"] = len(source.manifest.files)
    try:
        table = _table(folder, source, tensor)
        tensors = load.check(table, folders.read_folder(folder).family, source)
    except UsageError:
        raise
    except CheckpointError as error:
        result["problems"] = [*problems, str(error)]
        return result
    result["tensor"] = table.plan.tensor_degree
    result["weights"] = len(tensors.all)
    total = sum(weight.layout.nbytes for weight in source.weights.values())
    on_total(total if conversion is None else total + conversion.source_bytes)
    budget = _BUDGET
    largest = max((sum(source.weights[path].layout.row_buffers) for path in sound), default=0)
    if largest > budget.arena:
        budget = replace(budget, arena=largest)
    reading = _Reading(source, tensors, Workers(budget), on_bytes)
    whole = [tensor for tensor in tensors.all if tensor.path in sound]
    for found in reading.workers.run(reading.problems_of, whole):
        problems += found
    if conversion is not None:
        problems += _differences(conversion, source, budget, on_bytes)
    result["problems"] = problems
    return result


def _table(folder: Path, source: OrbaxFolder, tensor: int | None) -> WeightTable:
    config = folders.read_folder(folder).config
    if tensor is None:
        planned = source.manifest.mesh.get("tensor", 1) * source.manifest.mesh.get("rep", 1)
        others = [d for d in even_degrees(config) if d != planned and d <= 8]
        tensor = min((d for d in others if d > 1), default=1)
    return WeightTable(config, Plan(mesh=make_mesh(tensor=tensor)).fit(config))


class _Reading:
    """Weights of a checkpoint, row by row, each row put together from the slices of a mesh."""

    def __init__(self, source: OrbaxFolder, tensors: Tensors, workers: Workers, on_bytes: OnBytes):
        self.source, self.tensors = source, tensors
        self.workers, self.on_bytes = workers, on_bytes

    def problems_of(self, tensor: Tensor, arena: np.ndarray) -> list[str]:
        weight = self.source.weights[tensor.path]
        digests = Digests(weight.layout)
        try:
            for rows, cut in self._rows(tensor, weight, arena):
                digests.add(rows, cut)
        except CheckpointError as error:
            return [str(error)]
        whole, chunks = digests.finish()
        path = self.source.folder / weight.file
        wrong = [n for n in range(weight.layout.chunks) if weight.differs(n, chunks)]
        if wrong:
            return [self.source.damaged(weight, chunk) for chunk in wrong]
        if not blank_padding(self.source.folder, weight):
            return [self.source.damaged(weight, weight.layout.chunks - 1)]
        if whole != weight.digest:
            return [f"{path}: {tensor.path} as devices read it is not what was written"]
        return []

    def _rows(
        self, tensor: Tensor, weight: Weight, arena: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        layout = weight.layout
        dtype = NUMPY[layout.dtype]
        step, (buffer, cut) = divide(arena, layout.rows, *layout.row_buffers)
        slices = sorted(self.tensors.slices(tensor))
        for first in range(0, layout.rows, step):
            self.workers.go_on()
            rows = buffer[: layout.rows - first]
            values = rows.view(dtype).reshape(-1, *layout.shape[1:])
            for bounds in slices:
                self._fill(weight, bounds, first, values)
            yield rows, layout.cut(rows, cut.reshape(-1))
            self.on_bytes(rows.size)

    def _fill(self, weight: Weight, bounds, first: int, values: np.ndarray) -> None:
        """The part of a device's slice that lies in these rows, to its place in them."""
        (low, high), *others = bounds
        low, high = max(low, first), min(high, first + len(values))
        if low >= high:
            return
        index = (slice(low - first, high - first), *(slice(a, b) for a, b in others))
        out = values[index]
        for where, part in self.source.parts(weight.path, ((low, high), *others), out):
            if part is not None:
                out[where] = part


def _differences(
    conversion: Conversion, source: OrbaxFolder, budget: Budget, on_bytes: OnBytes
) -> list[str]:
    """What of the source is not what the manifest says it was."""
    workers = Workers(budget)

    def of(item: Item, arena: np.ndarray) -> list[str]:
        weight = source.weights.get(item.path)
        if weight is None or weight.shape != item.layout.shape:
            return [f"{item.info.file}: {item.name} is not in the checkpoint, or of another shape"]
        original, stored = xxhash.xxh3_128(), xxhash.xxh3_128()
        dtype = NUMPY[weight.dtype]
        elements = item.layout.row_bytes // item.layout.itemsize
        step, (raw, cast) = divide(
            arena, item.layout.rows, item.source_row_bytes, elements * dtype.itemsize
        )
        with conversion.source.rows(item.name) as read:
            for first in range(0, item.layout.rows, step):
                workers.go_on()
                rows = raw[: item.layout.rows - first]
                read(first, rows)
                original.update(rows.reshape(-1).data)
                target = cast[: len(rows)]
                load.cast_into(target.view(dtype), rows.view(NUMPY[item.stored]))
                stored.update(target.reshape(-1).data)
                on_bytes(rows.size)
        if original.hexdigest() != weight.source.digest:
            return [f"{item.info.file}: {item.name} is not what {weight.path} was made from"]
        if stored.hexdigest() != weight.digest:
            return [f"{source.folder / weight.file}: {weight.path} is not {item.name}, cast"]
        return []

    problems = [line for found in workers.run(of, conversion.items) for line in found]
    cast = any(w.dtype != load.READABLE[w.source.dtype] for w in source.weights.values())
    for path in sorted(conversion.folder.path.iterdir()):
        if not keep(path) or (cast and path.name == "config.json"):
            continue
        info = source.manifest.files.get(path.name)
        if info is None or info.digest != xxhash.xxh3_128_hexdigest(read_small(path)):
            problems.append(f"{path}: not the file that went into the checkpoint")
    return problems
