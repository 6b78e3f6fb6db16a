"""What a conversion would do, exactly, without reading or writing a weight."""

from dataclasses import asdict
from pathlib import Path

from checkpoints_tools.plan import Conversion, Item, plan
from tpjax.padding import padding
from tpjax.parallel.rules import sharding_word

_HEAD = ("source", "dtype", "->", "weight", "shape", "dtype", "axes", "split over", "MB/device")


def dry_run(
    src: str | Path, dtype: str | None, mesh: dict[str, int], max_host_bytes: int
) -> tuple[dict, str]:
    """The plan as an object and as text. Of a lone config.json, names are what they would be."""
    conversion = plan(src, dtype=dtype, headers_only=True, **mesh)
    budget = conversion.budget(max_host_bytes)
    cost = padding(conversion.table)
    shape = dict(conversion.table.plan.mesh.shape)
    result = {
        "source": str(src),
        "family": conversion.folder.family.model_type,
        "padding": asdict(cost),
        "parameters": conversion.table.parameters,
        "mesh": shape,
        "source_bytes": conversion.source_bytes,
        "bytes": conversion.bytes,
        "bytes_per_device": conversion.bytes_per_device,
        "peak_buffers_bytes": budget.bytes,
        "workers": budget.workers,
        "tied_copies": sorted(conversion.copies.values()),
        "left_out": list(conversion.left_out),
        "weights": [_weight(item) for item in conversion.items],
    }
    return result, "\n".join(_lines(conversion, result))


def _weight(item: Item) -> dict:
    return {
        "source": item.name,
        "file": item.info.file.name,
        "source_dtype": item.stored,
        "path": item.path,
        "shape": list(item.layout.shape),
        "dtype": item.layout.dtype,
        "axes": list(item.tensor.axes),
        "sharding": sharding_word(item.tensor.parts[0].spec.sharding),
        "chunks": item.layout.chunks,
        "bytes": item.layout.nbytes,
        "bytes_per_device": item.bytes_per_device,
    }


def _lines(conversion: Conversion, result: dict) -> list[str]:
    rows: list[tuple[str, ...]] = [_HEAD]
    for weight in result["weights"]:
        rows.append(
            (
                weight["source"],
                weight["source_dtype"],
                "->",
                weight["path"],
                str(weight["shape"]),
                weight["dtype"],
                ", ".join(axis or "-" for axis in weight["axes"]),
                weight["sharding"],
                f"{weight['bytes_per_device'] / 1e6:.2f}",
            )
        )
    widths = [max(len(row[n]) for row in rows) for n in range(len(_HEAD))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    mesh = " x ".join(f"{name}={size}" for name, size in result["mesh"].items())
    lines += [
        "",
        f"{result['family']}, {result['parameters']:,} parameters:"
        f" {len(result['weights'])} weights, {result['source_bytes'] / 1e9:.3f} GB to read,"
        f" {result['bytes'] / 1e9:.3f} GB to write",
        f"on the mesh {mesh}: {result['bytes_per_device'] / 1e9:.3f} GB of weights per device",
        str(padding(conversion.table)),
        f"host memory: {result['peak_buffers_bytes'] / 1e6:.0f} MB of buffers, and about 0.1 GB of"
        f" the program itself; {result['workers']} weight(s) at a time",
    ]
    for what, names in (
        ("tied copies, compared and kept as one", result["tied_copies"]),
        ("left out, they hold no weight", result["left_out"]),
    ):
        if names:
            lines.append(f"{what}: {', '.join(names)}")
    return lines
