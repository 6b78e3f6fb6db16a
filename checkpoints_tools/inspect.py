"""Inspect: what a checkpoint is and whether it fits together, without reading a weight."""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from checkpoints_tools.sources import hub_headers, hugging_face
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint import load
from tpjax.checkpoint.orbax import OrbaxFolder, is_checkpoint
from tpjax.checkpoint.safetensors import READABLE, TensorInfo, read_json
from tpjax.errors import CheckpointError
from tpjax.models import FAMILIES
from tpjax.parallel.degrees import even_degrees
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan
from tpjax.weights import WeightTable

# Bits of one element, of every word that safetensors knows.
_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16}
_BITS |= {"BF16": 16, "I16": 16, "U16": 16, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_EIGHT = 8


@dataclass
class _Found:
    """What was found out so far."""

    about: dict
    problems: list[str]


def inspect(path: str | Path) -> dict:
    """What ``path`` is, as an object; ``problems`` lists what does not match. Raises
    CheckpointError only where there is no checkpoint at all."""
    local = os.path.isdir(path)
    folder = folders.locate(path, weights=None)
    folders.refuse_unfinished(folder)
    found = _Found({"path": str(path), "format": None}, [])
    source = _source(folder, found, None if local else str(path))
    tensors = source.tensors if source else {}
    found.about |= {
        "tensors": len(tensors),
        "elements": sum(math.prod(t.shape) for t in tensors.values()),
        "bytes": sum(map(_bytes, tensors.values())),
        "dtypes": dict(Counter(READABLE.get(t.dtype, t.dtype) for t in tensors.values())),
        "files": len({t.file for t in tensors.values()}),
    }
    _model(folder, source, found)
    found.about["problems"] = found.problems
    found.about["weights"] = {
        name: {"shape": list(t.shape), "dtype": READABLE.get(t.dtype, t.dtype), "file": t.file.name}
        for name, t in sorted(tensors.items())
    }
    return found.about


def _source(folder: Path, found: _Found, hub: str | None):
    try:
        if not is_checkpoint(folder):
            found.about["format"] = "Hugging Face"
            if hub is not None:
                return hub_headers(hub, folder)
            return hugging_face(folder)
        found.about["format"] = "tpjax"
        source = OrbaxFolder(folder, verify=None)
    except CheckpointError as error:
        if not (folder / "config.json").is_file():
            raise
        found.problems.append(str(error))
        return None
    found.about |= {"made_by": source.manifest.tool, "made_from": source.manifest.source}
    found.problems += source.check_files()
    found.problems += filter(None, map(source.frame, source.weights.values()))
    return source


def _model(folder: Path, source, found: _Found) -> None:
    """Family, parameters, and whether config and weights are of one model."""
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    kind = raw.get("model_type")
    found.about |= {"family": kind, "supported": isinstance(kind, str) and kind in FAMILIES}
    try:
        model = folders.read_folder(folder)
        table = WeightTable(model.config, Plan(mesh=make_mesh()))
        found.about |= {
            "parameters": table.parameters,
            "tied": model.config.tie_embeddings,
            "even_tensor_degrees": even_degrees(model.config),
            "largest_tensor_degree": model.config.heads,
        }
        if source is not None:
            load.check(table, model.family, source)
    except CheckpointError as error:
        found.problems.append(str(error))


def _bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * _BITS.get(info.dtype, _EIGHT) // 8


def lines(about: dict, weights: bool) -> list[str]:
    """The same for people."""
    dtypes = ", ".join(f"{n} x {dtype}" for dtype, n in about["dtypes"].items()) or "none"
    out = [f"{about['path']}: a {about['format']} checkpoint"]
    if "made_by" in about:
        out.append(f"  made by {about['made_by']} from {about['made_from']}")
    out.append(f"  family {about['family']}" + ("" if about["supported"] else " (not supported)"))
    if "parameters" in about:
        tied = "tied" if about["tied"] else "not tied"
        out.append(f"  {about['parameters']:,} parameters, embeddings {tied}")
        even = ", ".join(map(str, about["even_tensor_degrees"]))
        most = about["largest_tensor_degree"]
        out.append(f"  tensor degrees up to {most}; without padding {even}")
    size = f"{about['bytes'] / 1e9:.3f} GB in {about['files']} file(s)"
    out.append(f"  {about['tensors']} tensors ({dtypes}), {size}")
    if weights:
        for name, of in about["weights"].items():
            out.append(f"  {name}  {of['shape']}  {of['dtype']}  {of['file']}")
    out += [f"problem: {problem}" for problem in about["problems"]]
    return [printable(line) for line in out]


def printable(line: str) -> str:
    """What can be shown of a line in which names of a file stand: it stays one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
