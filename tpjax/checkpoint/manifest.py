"""The manifest of a tpjax checkpoint: what every weight and file must be, down to the byte.

A checkpoint is a folder with ``tpjax_manifest.json``, the model's small files as they were
(``config.json``, the tokenizer, ...) and ``weights/``, an Orbax checkpoint, one array per weight.
Neither Orbax nor safetensors notices a flipped byte in the data; this file is what does. Digests
are xxh3 (128 bits for weights and files, 64 for chunks): they find damage, not forgery.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import xxhash

from tpjax.checkpoint.layout import NUMPY, Layout
from tpjax.checkpoint.safetensors import one_line
from tpjax.errors import CheckpointError

MANIFEST = "tpjax_manifest.json"
WEIGHTS = "weights"
JOURNAL = ".tpjax-journal"  # in a folder that a conversion has not finished
FORMAT, VERSION = "tpjax checkpoint", 1
_CHUNK_DIGEST = 16  # hexadecimal digits
_SEALED = re.compile(rb'(.*),\n "digest": "([0-9a-f]{32})"\n}\n', re.DOTALL)
_PATH = re.compile(r"\w[\w.]*")
DAMAGED = "convert the source again, or copy the file again"


class NewerFormat(CheckpointError):
    """A checkpoint that a newer tpjax wrote."""


@dataclass(frozen=True)
class Source:
    """The tensor a weight was made from. ``digest``: xxh3-128 of its bytes in C order."""

    file: str
    name: str
    dtype: str
    digest: str


@dataclass(frozen=True)
class Weight:
    """One weight; ``digest`` and ``chunks`` are of what is stored, cast if there was a cast."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    cut: tuple[int, int]  # axis and width of the chunks
    source: Source
    digest: str
    chunks: str  # xxh3-64 of each chunk, joined
    finite: bool = True  # False only where NaNs or infinities were allowed

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.shape, self.dtype, *self.cut)

    @property
    def folder(self) -> str:
        """Of the array, relative to the checkpoint."""
        return f"{WEIGHTS}/{self.path}"

    @property
    def file(self) -> str:
        """That holds the data, relative to the checkpoint."""
        return f"{self.folder}/{self.layout.file}"

    def differs(self, chunk: int, digests: str) -> bool:
        """Whether this chunk's digest is another one in ``digests``, joined like `chunks`."""
        where = slice(chunk * _CHUNK_DIGEST, (chunk + 1) * _CHUNK_DIGEST)
        return self.chunks[where] != digests[where]

    def chunk_digest(self, chunk: int) -> str:
        return self.chunks[chunk * _CHUNK_DIGEST : (chunk + 1) * _CHUNK_DIGEST]


@dataclass(frozen=True)
class FileInfo:
    """A small file beside the data: its size and xxh3-128."""

    bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a checkpoint without reading its weights."""

    tool: str
    source: str
    mesh: dict[str, int]  # the mesh it was planned for; it restores on any other
    weights: tuple[Weight, ...]
    files: dict[str, FileInfo]
    source_files: dict[str, tuple[int, int]]  # bytes and modification time, in ns, when converted
    copies: dict[str, Source] = field(default_factory=dict)  # tied copies, by path of the original
    left_out: tuple[str, ...] = ()  # tensors of the source that hold no weight

    def sealed(self) -> bytes:
        """The file's content; its last line is the digest of everything before."""
        about = {"format": FORMAT, "version": VERSION} | asdict(self)
        body = json.dumps(about, indent=1).encode()[:-2]
        return body + f',\n "digest": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises CheckpointError for a manifest that was damaged or edited, NewerFormat for one
        that a newer tpjax made."""
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from error
        parts = _SEALED.fullmatch(raw)
        whole = parts is not None and xxhash.xxh3_128_hexdigest(parts[1]).encode() == parts[2]
        try:
            about = json.loads(raw)
            version = about["version"]
        except (ValueError, RecursionError, TypeError, LookupError) as error:
            why = one_line(error)
            raise CheckpointError(f"{path}: damaged ({why}); {DAMAGED}") from error
        if isinstance(version, int) and version > VERSION:
            raise NewerFormat(
                f"{path}: of format {version}, and this tpjax reads up to {VERSION}: upgrade tpjax"
                + ("" if whole else ", or convert the source again if the file was damaged")
            )
        if not whole or about.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: damaged or edited (it does not match its own digest); {DAMAGED}"
            )
        try:
            return cls._of(about)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: not a manifest of format {VERSION} ({one_line(error)})"
            ) from error

    @classmethod
    def _of(cls, about: dict) -> "Manifest":
        mesh = {str(axis): _whole(size) for axis, size in about["mesh"].items()}
        return cls(
            tool=_text(about["tool"]),
            source=_text(about["source"]),
            mesh=mesh,
            weights=tuple(weight_of(record) for record in about["weights"]),
            files={
                inside(name): FileInfo(_whole(info["bytes"]), _text(info["digest"]))
                for name, info in about["files"].items()
            },
            source_files={
                _text(name): (_whole(of[0]), _whole(of[1]))
                for name, of in about["source_files"].items()
            },
            copies={_text(path): _source(source) for path, source in about["copies"].items()},
            left_out=tuple(_text(name) for name in about["left_out"]),
        )


def weight_of(record: dict) -> Weight:
    """A weight from its JSON object; raises KeyError, TypeError or ValueError for what is none."""
    axis, width = map(_whole, record["cut"])
    weight = Weight(
        path=_text(record["path"]),
        shape=tuple(map(_whole, record["shape"])),
        dtype=_text(record["dtype"]),
        axes=tuple(None if name is None else _text(name) for name in record["axes"]),
        cut=(axis, width),
        source=_source(record["source"]),
        digest=_text(record["digest"]),
        chunks=_text(record["chunks"]),
        finite=record["finite"] is True,
    )
    if not _PATH.fullmatch(weight.path) or weight.dtype not in NUMPY:
        raise ValueError(f"no weight: {weight.path!r} of {weight.dtype!r}")
    if not 0 <= axis < len(weight.shape) <= 2 or min(weight.shape) < 1:
        raise ValueError(f"{weight.path}: {weight.shape} cut by {weight.cut}")
    if not 1 <= width <= weight.shape[axis]:
        raise ValueError(f"{weight.path}: {weight.shape} cut by {weight.cut}")
    if weight.layout.data_bytes >= 1 << 62:
        raise ValueError(f"{weight.path}: {weight.shape} is more than any file holds")
    if len(weight.chunks) != weight.layout.chunks * _CHUNK_DIGEST:
        raise ValueError(
            f"{weight.path}: {weight.layout.chunks} chunks, digests of other than that"
        )
    return weight


def _source(record: dict) -> Source:
    words = ("name", "dtype", "digest")
    return Source(file=inside(record["file"]), **{word: _text(record[word]) for word in words})


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def inside(name: str) -> str:
    """``name``, if it is a relative path that stays inside the folder; raises ValueError."""
    parts = Path(_text(name)).parts
    if not parts or Path(name).is_absolute() or ".." in parts or not name.isprintable():
        raise ValueError(f"{name!r} is not inside the folder")
    return name
