"""A plan as text, as markdown and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from tpjax.inventory import Weight, weights
from tpjax.parallel.layout import Layout
from tpjax.planner.memory import USABLE, Memory, usable
from tpjax.planner.roofline import Step
from tpjax.planner.search import Mesh, Refused, Wish

PARTS = ("memory", "arithmetic", "communication", "launch")
HEAD = (
    "mesh",
    "fits",
    "weights",
    "cache",
    "temp",
    "max batch",
    "max context",
    "first token",
    "tok/s/user",
    "tok/s",
    "of limit",
    "/".join(("mem", "math", "comm", "launch")),
)


def rows(ranked: Sequence[Mesh]) -> list[tuple[str, ...]]:
    """A line of cells for every mesh."""
    return [
        (
            mesh.words,
            "yes" if mesh.fits else "NO",
            f"{mesh.memory.weights / 1e9:.2f}",
            f"{mesh.memory.cache / 1e9:.2f}",
            f"{mesh.memory.temporary / 1e9:.2f}",
            f"{mesh.most_batch}" if mesh.most_batch < 1 << 16 else "65536+",
            f"{mesh.longest_context}",
            f"{mesh.prefill.total * 1e3:.0f} ms",
            f"{mesh.per_user:.1f}",
            f"{mesh.total:.0f}",
            f"{mesh.share_of_limit:.0%}",
            "/".join(f"{100 * mesh.decode.share(part):.0f}" for part in PARTS) + " %",
        )
        for mesh in ranked
    ]


def table(head: Sequence[str], body: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    """Aligned columns, or a markdown table."""
    if markdown:
        lines = [f"| {' | '.join(cells)} |" for cells in (head, *body)]
        return [lines[0], "|" + "---|" * len(head), *lines[1:]]
    widths = [max(len(cells[n]) for cells in (head, *body)) for n in range(len(head))]
    return [
        "  ".join(
            c.ljust(w) if n == 0 else c.rjust(w)
            for n, (c, w) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in (head, *body)
    ]


def lines(
    wish: Wish,
    name: str,
    ranked: Sequence[Mesh],
    refused: Sequence[Refused],
    sentence: str,
    notes: Sequence[str],
    markdown: bool = False,
) -> list[str]:
    """Everything a person wants to know."""
    c, chip = wish.config, wish.hardware.chip
    stored = sum(w.stored for w in weights(c, Layout.of()))
    out = [
        f"{name}: {stored / 1e9:.3f} billion parameters, {words_of(wish)};"
        f" batch {wish.batch}, context {wish.context}, prompt {wish.prompt}",
        f"{wish.hardware}: {usable(chip) / 1e9:.1f} GB usable ({USABLE:.0%} of"
        f" {chip.memory / 1e9:.1f}), {chip.bandwidth / 1e12:g} TB/s,"
        f" {chip.link.kind} {chip.link.gbs:g} GB/s"
        + (f", {chip.network.kind} {chip.network.gbs:g} GB/s" if wish.hardware.nodes > 1 else ""),
        "",
        *table(HEAD, rows(ranked), markdown),
        "",
        "GB per device; rates and times are predicted, not measured; shares are of decode.",
        "",
        sentence,
    ]
    sums = next((mesh for mesh in ranked if mesh.sums), None)
    if sums is not None:
        out.append(
            f"tensor and expert degrees sum {sums.sums} times per token,"
            f" {sums.sum_bytes / 1e6:.2f} MB for each sequence"
        )
    padded: dict[str, list[str]] = {}
    warned: dict[str, list[str]] = {}
    for mesh in ranked:
        for text in mesh.padding:
            padded.setdefault(text, []).append(mesh.words)
        for text in mesh.warnings:
            warned.setdefault(text, []).append(mesh.words)
    out += [f"padding: {text}: {'; '.join(where)}" for text, where in padded.items()]
    out += [f"warning: {text}: {'; '.join(where)}" for text, where in warned.items()]
    out += [f"refused: {mesh.words}: {mesh.why}" for mesh in refused]
    return out + [f"warning: {note}" for note in notes]


def words_of(wish: Wish) -> str:
    """``bfloat16 weights``, and the cache's dtype if it is another."""
    kept = f", {wish.cache_dtype} cache" if wish.cache_dtype != wish.weight_dtype else ""
    return f"{wish.weight_dtype} weights{kept}"


def document(
    wish: Wish,
    name: str,
    ranked: Sequence[Mesh],
    refused: Sequence[Refused],
    sentence: str,
    notes: Sequence[str],
) -> dict:
    """The same for a program. Bytes, seconds, tokens per second."""
    return {
        "model": name,
        "hardware": {
            "chip": wish.hardware.chip.key,
            "devices": wish.hardware.devices,
            "nodes": wish.hardware.nodes,
            "usable_bytes": usable(wish.hardware.chip),
            "source": wish.hardware.chip.source,
        },
        "weight_dtype": wish.weight_dtype,
        "cache_dtype": wish.cache_dtype,
        "batch": wish.batch,
        "context": wish.context,
        "prompt": wish.prompt,
        "best": sentence,
        "meshes": [_mesh(mesh) for mesh in ranked],
        "refused": [asdict(mesh) for mesh in refused],
        "warnings": list(notes),
    }


def _mesh(mesh: Mesh) -> dict:
    return {
        "mesh": {"stage": mesh.stage} | mesh.layout.shape,
        "fits": mesh.fits,
        "bytes": _bytes(mesh.memory),
        "most_batch": mesh.most_batch,
        "longest_context": mesh.longest_context,
        "all_reduces_per_token": mesh.sums,
        "all_reduce_bytes_per_token": mesh.sum_bytes,
        "first_token_seconds": mesh.prefill.total,
        "prefill_seconds": _step(mesh.prefill),
        "tokens_per_second_per_user": mesh.per_user,
        "tokens_per_second": mesh.total,
        "share_of_limit": mesh.share_of_limit,
        "decode_seconds": _step(mesh.decode),
        "padding": list(mesh.padding),
        "warnings": list(mesh.warnings),
    }


def _bytes(held: Memory) -> dict:
    return asdict(held) | {"total": held.total}


def _step(step: Step) -> dict:
    return asdict(step) | {"total": step.total}


def explanation(
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


def weights_of(wish: Wish, layout: Layout, decided: Mapping[str, str]) -> list[dict]:
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
