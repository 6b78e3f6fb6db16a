"""Export: a tpjax checkpoint back into a Hugging Face folder of safetensors.

Tensors have the names, and lie in files of the names, that they came from. What is written is
hashed on the way and compared with the manifest, so an export is exact or it does not appear.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from checkpoints_tools.sources import stored_rows
from checkpoints_tools.staging import (
    check_dst,
    check_places,
    check_space,
    is_partial,
    named,
    partial_of,
    stage,
)
from checkpoints_tools.workers import ARENA, Budget, Workers, divide
from tpjax.checkpoint.files import INDEX, SINGLE
from tpjax.checkpoint.manifest import MANIFEST, WEIGHTS, Source, Weight
from tpjax.checkpoint.orbax import OrbaxFolder, is_checkpoint
from tpjax.checkpoint.safetensors import WORDS
from tpjax.errors import CheckpointError, UsageError

OnBytes = Callable[[int], object]


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write: what of the checkpoint, and where in its file."""

    name: str
    weight: Weight
    file: str
    offset: int


def export(
    src: str | Path,
    dst: str | Path,
    *,
    on_total: OnBytes = lambda total: None,
    on_bytes: OnBytes = lambda count: None,
) -> dict:
    """Write the folder ``dst``, whole or not at all; returns what was written.

    Raises CheckpointError naming the weight and file that do not match the manifest.
    """
    src = Path(os.path.expanduser(src))
    dst = Path(os.path.realpath(os.path.expanduser(dst)))
    if not is_checkpoint(src):
        raise CheckpointError(f"{src}: no {MANIFEST}; give a tpjax checkpoint")
    check_dst(dst)
    if dst.is_dir() and any(dst.iterdir()):
        raise UsageError(f"{dst}: a tpjax checkpoint; give a new folder")
    source = OrbaxFolder(src)
    check_places(src, dst)
    files = _files(source)
    tensors = [tensor for shard in files.values() for tensor in shard]
    total = sum(tensor.weight.layout.nbytes for tensor in tensors)
    check_space(dst, total)
    on_total(total)
    with stage(dst) as staging:
        if is_partial(dst):
            raise UsageError(f"{partial_of(dst)}: an unfinished conversion; give another folder")
        staging.clear()  # what an export that was killed has left
        for file, shard in files.items():
            staging.write(file, _header(shard))
        workers = Workers(Budget(4, _arena(source)))

        def one(tensor: _Tensor, arena: np.ndarray) -> None:
            _write(source, tensor, staging.path / tensor.file, arena, workers, on_bytes)

        workers.run(one, tensors)
        if len(files) > 1:
            where = {tensor.name: tensor.file for tensor in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            staging.write(INDEX, json.dumps(index, indent=2).encode() + b"\n")
        for name in source.manifest.files:
            if not name.startswith(f"{WEIGHTS}/"):
                staging.write(name, (src / name).read_bytes())
        for file in files:
            with named(staging.path / file):
                fd = os.open(staging.path / file, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
        staging.commit()
    return {
        "folder": str(dst),
        "tensors": len(tensors),
        "files": len(files),
        "bytes": total,
    }


def _files(source: OrbaxFolder) -> dict[str, list[_Tensor]]:
    """The files to write, each with its tensors in order."""
    manifest = source.manifest
    wanted = [(weight, weight.source) for weight in manifest.weights]
    wanted += [(source.weights[path], copy) for path, copy in manifest.copies.items()]
    single = len({of.file for _, of in wanted}) == 1
    files: dict[str, list[_Tensor]] = {}
    for weight, of in sorted(wanted, key=lambda pair: (pair[1].file, pair[1].name)):
        file = SINGLE if single else _file(of)
        before = files.setdefault(file, [])
        offset = before[-1].offset + before[-1].weight.layout.nbytes if before else 0
        before.append(_Tensor(of.name, weight, file, offset))
    return files


def _file(source: Source) -> str:
    """Legacy files become safetensors."""
    name = source.file.removesuffix(".bin").removesuffix(".safetensors")
    return f"{name.replace('pytorch_model', 'model')}.safetensors"


def _header(shard: list[_Tensor]) -> bytes:
    """A safetensors header: its length, and JSON filled up with spaces to a multiple of 8 bytes."""
    about: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    for tensor in shard:
        layout = tensor.weight.layout
        about[tensor.name] = {
            "dtype": WORDS[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [tensor.offset, tensor.offset + layout.nbytes],
        }
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _arena(source: OrbaxFolder) -> int:
    return max([ARENA, *(sum(w.layout.row_buffers) for w in source.weights.values())])


def _write(source: OrbaxFolder, tensor: _Tensor, path: Path, arena, workers, on_bytes) -> None:
    """One weight's rows, put together from its chunks, to their place in the file."""
    weight, digest = tensor.weight, xxhash.xxh3_128()
    layout = weight.layout
    step, (buffer, cut) = divide(arena, layout.rows, *layout.row_buffers)
    with named(path), open(path, "r+b", buffering=0) as out:
        length = int.from_bytes(out.read(8), "little")
        out.seek(8 + length + tensor.offset)
        with stored_rows(source.folder, weight, cut.reshape(-1)) as read:
            for first in range(0, layout.rows, step):
                workers.go_on()
                rows = buffer[: layout.rows - first]
                read(first, rows)
                digest.update(rows.reshape(-1).data)
                _write_all(out, rows.reshape(-1))
                on_bytes(rows.size)
    if digest.hexdigest() != weight.digest:
        raise CheckpointError(
            f"{source.folder / weight.file}: {weight.path} is damaged; nothing was exported"
        )


def _write_all(out, data: np.ndarray) -> None:
    done = 0
    while done < len(data):
        done += out.write(data[done:])
