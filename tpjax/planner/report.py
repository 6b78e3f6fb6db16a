"""A plan as text, as markdown and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tpjax.inventory import weights
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


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What `tpjax plan` found: meshes, best first, those that are refused, and what to say."""

    name: str  # of the model
    wish: Wish
    ranked: Sequence[Mesh]
    refused: Sequence[Refused]
    sentence: str  # about the best
    notes: Sequence[str] = ()

    def lines(self, markdown: bool = False) -> list[str]:
        """Everything a person wants to know."""
        wish, hardware = self.wish, self.wish.hardware
        chip, link, network = hardware.chip, hardware.chip.link, hardware.chip.network
        stored = sum(w.stored for w in weights(wish.config, Layout.of()))
        between = f", {network.kind} {network.gbs:g} GB/s" if hardware.nodes > 1 else ""
        out = [
            f"{self.name}: {stored / 1e9:.3f} billion parameters, {words_of(wish)};"
            f" batch {wish.batch}, context {wish.context}, prompt {wish.prompt}",
            f"{hardware}: {usable(chip) / 1e9:.1f} GB usable ({USABLE:.0%} of"
            f" {chip.memory / 1e9:.1f}), {chip.bandwidth / 1e12:g} TB/s,"
            f" {link.kind} {link.gbs:g} GB/s{between}",
            "",
            *table(HEAD, rows(self.ranked), markdown),
            "",
            "GB per device; rates and times are predicted, not measured; shares are of decode.",
            "",
            self.sentence,
        ]
        sums = next((mesh for mesh in self.ranked if mesh.sums), None)
        if sums is not None:
            out.append(
                f"tensor and expert degrees sum {sums.sums} times per token,"
                f" {sums.sum_bytes / 1e6:.2f} MB for each sequence"
            )
        padded: dict[str, list[str]] = {}
        warned: dict[str, list[str]] = {}
        for mesh in self.ranked:
            for text in mesh.padding:
                padded.setdefault(text, []).append(mesh.words)
            for text in mesh.warnings:
                warned.setdefault(text, []).append(mesh.words)
        out += [f"padding: {text}: {'; '.join(where)}" for text, where in padded.items()]
        out += [f"warning: {text}: {'; '.join(where)}" for text, where in warned.items()]
        out += [f"refused: {mesh.words}: {mesh.why}" for mesh in self.refused]
        return out + [f"warning: {note}" for note in self.notes]

    def document(self) -> dict:
        """The same for a program. Bytes, seconds, tokens per second."""
        wish, hardware = self.wish, self.wish.hardware
        return {
            "model": self.name,
            "hardware": {
                "chip": hardware.chip.key,
                "devices": hardware.devices,
                "nodes": hardware.nodes,
                "usable_bytes": usable(hardware.chip),
                "source": hardware.chip.source,
            },
            "weight_dtype": wish.weight_dtype,
            "cache_dtype": wish.cache_dtype,
            "batch": wish.batch,
            "context": wish.context,
            "prompt": wish.prompt,
            "best": self.sentence,
            "meshes": [_mesh(mesh) for mesh in self.ranked],
            "refused": [asdict(mesh) for mesh in self.refused],
            "warnings": list(self.notes),
        }


def words_of(wish: Wish) -> str:
    """``bfloat16 weights``, and the cache's dtype if it is another."""
    kept = f", {wish.cache_dtype} cache" if wish.cache_dtype != wish.weight_dtype else ""
    return f"{wish.weight_dtype} weights{kept}"


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
