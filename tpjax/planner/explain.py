"""`tpjax plan --explain`: what decided about each weight."""

from collections.abc import Mapping, Sequence

from tpjax.inventory import Weight, weights
from tpjax.parallel.layout import Layout
from tpjax.planner.report import table
from tpjax.planner.search import Wish


def lines(
    wish: Wish, layout: Layout, decided: Mapping[str, str], markdown: bool = False
) -> list[str]:
    """A line for every weight, equal layers together: what decided, axes, sharding and bytes.
    ``decided``: of each weight that a pattern decided, the pattern."""
    alike: dict[tuple, list[Weight]] = {}
    for weight in weights(wish.config, layout, wish.weight_bytes):
        key = (_template(weight), decided.get(weight.path), weight.axes, weight.dims)
        alike.setdefault(key, []).append(weight)
    body = [
        (
            _named(found),
            decided.get(found[0].path) or _rules(found[0], layout),
            ", ".join(dim.axis or "-" for dim in found[0].dims),
            " x ".join(str(dim.size) for dim in found[0].dims),
            found[0].sharding,
            f"{found[0].bytes_per_device / 1e6:.3f}",
            f"{len(found)}",
        )
        for found in alike.values()
    ]
    head = ("weight", "decided by", "axes", "shape", "split over", "MB/device each", "weights")
    return table(head, body, markdown)


def documents(wish: Wish, layout: Layout, decided: Mapping[str, str]) -> list[dict]:
    """Every weight, for a program."""
    return [
        {
            "path": weight.path,
            "decided_by": decided.get(weight.path) or _rules(weight, layout),
            "axes": [dim.axis for dim in weight.dims],
            "shape": [dim.size for dim in weight.dims],
            "split_over": [list(names) for names in weight.axes],
            "bytes_per_device": weight.bytes_per_device,
        }
        for weight in weights(wish.config, layout, wish.weight_bytes)
    ]


def _template(weight: Weight) -> str:
    parts = weight.path.split(".")
    return ".".join(["blocks", "*", *parts[2:]] if parts[0] == "blocks" else parts)


def _named(found: Sequence[Weight]) -> str:
    """``blocks.0-31.attn.q.w``; layers that are not neighbours are listed."""
    parts = found[0].path.split(".")
    if parts[0] != "blocks":
        return found[0].path
    layers = [int(weight.path.split(".")[1]) for weight in found]
    starts = [n for n in layers if n - 1 not in layers]
    ends = [n for n in layers if n + 1 not in layers]
    runs = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return ".".join(["blocks", ",".join(runs), *parts[2:]])


def _rules(weight: Weight, layout: Layout) -> str:
    """The rules that decided: ``heads -> tensor x rep``."""
    here = layout.at(weight.path)
    said = {
        f"{dim.axis} -> {' x '.join(here.mesh_axes(dim.axis)) or 'whole'}"
        for dim in weight.dims
        if dim.axis is not None and (here.rules.mesh_axes(dim.axis) or dim.axis != "embed")
    }
    return ", ".join(sorted(said)) or "no rule splits it"
