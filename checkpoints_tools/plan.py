"""What becomes what: a conversion, planned from the headers alone."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from checkpoints_tools.sources import Headers, RowSource, hub_headers, hugging_face
from checkpoints_tools.workers import ARENA, SCRATCH, Budget
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint import load
from tpjax.checkpoint.folder import ModelFolder
from tpjax.checkpoint.layout import NUMPY, Layout
from tpjax.checkpoint.manifest import MANIFEST
from tpjax.checkpoint.safetensors import READABLE, WORDS, TensorInfo
from tpjax.checkpoint.tensors import Tensor, Tensors
from tpjax.errors import CheckpointError, UsageError
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan
from tpjax.weights import WeightTable

_MOST_WORKERS = 16


@dataclass(frozen=True)
class Item:
    """One tensor of the source, and how it will lie in the checkpoint."""

    tensor: Tensor
    info: TensorInfo
    layout: Layout

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def path(self) -> str:
        return self.tensor.path

    @property
    def stored(self) -> str:
        """The source's dtype."""
        return READABLE[self.info.dtype]

    @property
    def casts(self) -> bool:
        return self.stored != self.layout.dtype

    @property
    def source_row_bytes(self) -> int:
        return self.layout.row_bytes // self.layout.itemsize * NUMPY[self.stored].itemsize

    @property
    def source_bytes(self) -> int:
        return self.layout.rows * self.source_row_bytes

    @property
    def bytes_per_device(self) -> int:
        """On the plan's mesh, in the dtype of the checkpoint, padding included."""
        return self.tensor.bytes_per_device // self.tensor.dtype.itemsize * self.layout.itemsize

    @property
    def row_buffers(self) -> tuple[int, int, int]:
        """Bytes each row in flight takes: as read, as cast, as cut."""
        stored, cut = self.layout.row_buffers
        return self.source_row_bytes, stored if self.casts else 0, cut


@dataclass(frozen=True)
class Conversion:
    """A whole model. Where ``source`` is `Headers`, it can be planned, not run."""

    title: str  # the hub id, or the folder's name
    folder: ModelFolder
    table: WeightTable
    items: tuple[Item, ...]
    copies: dict[str, str]  # tied copies: our path -> the copy's name
    left_out: tuple[str, ...]
    source: RowSource

    @property
    def source_bytes(self) -> int:
        return sum(item.source_bytes for item in self.items)

    @cached_property
    def bytes(self) -> int:
        """Of the weights' files."""
        return sum(item.layout.file_bytes for item in self.items)

    @property
    def bytes_per_device(self) -> int:
        return sum(item.bytes_per_device for item in self.items)

    def budget(self, max_host_bytes: int) -> Budget:
        """How the limit is spent. Raises UsageError if not even one row of each weight fits."""
        largest = max(self.items, key=lambda item: sum(item.row_buffers))
        arena = min(ARENA, max_host_bytes - SCRATCH)
        if arena < (needed := sum(largest.row_buffers)):
            least = (needed + SCRATCH) / 1e9
            raise UsageError(
                f"--max-host-gb {max_host_bytes / 1e9:g}: one row of {largest.name} needs more;"
                f" give at least {least + 0.0005:.3f}"
            )
        most = min(_MOST_WORKERS, 2 * (os.cpu_count() or 1), len(self.items))
        return Budget(max(1, min(most, max_host_bytes // (ARENA + SCRATCH))), arena)


def plan(
    src: str | Path,
    *,
    dtype: str | None = None,
    data: int = 1,
    tensor: int = 1,
    rep: int = 1,
    headers_only: bool = False,
) -> Conversion:
    """Plan the conversion of a Hugging Face folder, a hub id or (nothing but plan) a config.json.

    ``dtype``: cast all weights to it; None keeps each as it is. The mesh decides nothing that is
    written; it is what the plan tells bytes per device of. Nothing but headers is read, and with
    ``headers_only`` nothing more of a hub id is downloaded. Raises CheckpointError if config and
    weights disagree, UsageError if the model refuses the mesh.
    """
    source: RowSource | None
    if str(src).endswith(".json") and os.path.isfile(src):
        folder, source = folders.config_only(Path(src)), None
    else:
        path, source = open_source(src, headers_only)
        folder = folders.read_folder(path)
    fitted = Plan(mesh=make_mesh(data, tensor, rep)).fit(folder.config)
    table = WeightTable(folder.config, fitted)
    family = folder.family
    if source is None:
        source = _as_configured(folder, table)
    ours, tensors = load.check(table, family, source), source.tensors
    copy = load.tied_copy(ours, source)
    copies = {} if copy is None else {"embed.w": copy[0]}
    items = []
    for one in ours.all:
        stored = dtype or READABLE[tensors[one.name].dtype]
        layout = Layout.of(one.shape, stored, one.split or 0, one.unit)
        items.append(Item(one, tensors[one.name], layout))
    known = {item.name for item in items} | set(copies.values())
    return Conversion(
        title=Path(src).resolve().name if os.path.exists(src) else str(src),
        folder=folder,
        table=table,
        items=tuple(items),
        copies=copies,
        left_out=tuple(sorted(name for name in tensors if name not in known)),
        source=source,
    )


def _as_configured(folder: ModelFolder, table: WeightTable) -> Headers:
    """What a model of this config would hold, in the dtype it names."""
    word = WORDS.get(folder.stored_dtype)
    if word is None:
        raise CheckpointError(
            f"{folder.path}: dtype {folder.stored_dtype!r}; readable are {', '.join(NUMPY)}"
        )
    tensors = {
        tensor.name: TensorInfo(folder.path, tensor.shape, word)
        for tensor in Tensors(table, folder.family).all
    }
    return Headers(folder.path, tensors)


def open_source(src: str | Path, headers_only: bool = False) -> tuple[Path, RowSource]:
    """A local folder and the tensors in it. Of a hub id's files the safetensors are downloaded, or
    legacy files where there are none; with ``headers_only`` neither."""
    if headers_only and not os.path.isdir(src):
        path = folders.locate(src, weights=None)
        return path, hub_headers(str(src), path)
    path = folders.locate(src)
    folders.refuse_unfinished(path)
    if (path / MANIFEST).is_file():
        raise UsageError(f"{src}: is a tpjax checkpoint already; `export` turns it back")
    if not os.path.isdir(src) and not any(path.glob("*.safetensors")):
        path = folders.locate(src, weights="pytorch_model*.bin")
    return path, hugging_face(path)
