"""A plan as a picture: scaling over the tensor degree, the roofline, the devices of the best mesh.

matplotlib draws it, the extra ``plot``.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tpjax import picture
from tpjax.parallel.degrees import AXES, refusal
from tpjax.parallel.layout import Layout
from tpjax.planner.chips import Hardware
from tpjax.planner.memory import Footprint, usable
from tpjax.planner.roofline import LIMIT, TPJAX, Roofline
from tpjax.planner.search import Mesh, Wish

BATCHES = tuple(2**n for n in range(11))


def plot(file: Path, name: str, wish: Wish, best: Mesh) -> None:
    """Write the picture; the file appears whole or not at all. Raises UsageError for another kind
    of file, ResourceError without matplotlib or where it cannot be written."""
    picture.check(file)
    from matplotlib.figure import Figure  # no display, no global state

    figure = Figure(figsize=(12, 8), layout="constrained")
    ((rate, memory, devices), (share, roof, empty)) = figure.subplots(2, 3)
    empty.axis("off")
    figure.suptitle(f"{name} on {wish.hardware}: predicted, context {wish.context}")
    _scaling(rate, memory, share, wish)
    _roofline(roof, wish, best)
    _devices(devices, best)
    handles, labels = rate.get_legend_handles_labels()
    empty.legend(handles, labels, loc="center", frameon=False)
    picture.save(figure, file)


def _degrees(wish: Wish) -> list[int]:
    most = wish.hardware.total
    powers = [2**n for n in range(12) if 2**n <= most]
    return [d for d in powers if refusal(wish.config, 1, d, 1) is None]


def _lines(wish: Wish, degree: int) -> tuple[Footprint, Roofline, Roofline]:
    """One replica on ``degree`` of the devices."""
    hardware = Hardware(wish.hardware.chip, min(degree, wish.hardware.devices), wish.hardware.nodes)
    held = Footprint(wish.config, Layout.of(tensor=degree).fit(wish.config), **wish.sizes)
    return held, Roofline(held, hardware, TPJAX), Roofline(held, hardware, LIMIT)


def _scaling(rate, memory, share, wish: Wish) -> None:
    degrees = _degrees(wish)
    lines = [_lines(wish, degree) for degree in degrees]
    for batch, style in ((1, "o-"), (wish.batch, "s-")) if wish.batch > 1 else ((1, "o-"),):
        steps = [line.decode(batch, wish.context) for _, line, _ in lines]
        limit = [batch / line.decode(batch, wish.context).total for _, _, line in lines]
        (drawn,) = rate.plot(
            degrees, [batch / step.total for step in steps], style, label=f"batch {batch}"
        )
        rate.plot(
            degrees, limit, "--", color=drawn.get_color(), label=f"batch {batch}, hardware limit"
        )
        share.plot(degrees, [100 * step.share("communication") for step in steps], style)
    rate.set(title="tokens/s of one replica", xscale="log", yscale="log")
    share.set(title="communication, % of a step", xscale="log", ylim=(0, 100))
    held = [held.memory(wish.batch, wish.context) for held, _, _ in lines]
    floor = np.zeros(len(held))
    places = np.arange(len(degrees))
    for part in ("weights", "cache", "temporary"):
        height = np.array([getattr(m, part) / 1e9 for m in held])
        memory.bar(places, height, bottom=floor, label=part)
        floor = floor + height
    memory.axhline(usable(wish.hardware.chip) / 1e9, color="black", linestyle="--")
    memory.set(title="GB on each device (line: usable)", xlabel="tensor degree")
    memory.set_xticks(places, [str(d) for d in degrees])
    memory.legend(frameon=False)
    for axes in (rate, share):
        axes.set_xticks(degrees, [str(d) for d in degrees])
        axes.minorticks_off()
        axes.set_xlabel("tensor degree")
        axes.grid(alpha=0.3)


def _roofline(axes, wish: Wish, best: Mesh) -> None:
    """Operations per second of one device against operations per byte it reads."""
    chip = wish.hardware.chip
    peak = chip.peak(wish.config.dtype)
    intensity = np.logspace(-1, 4, 50)
    axes.plot(intensity, np.minimum(peak, intensity * chip.bandwidth) / 1e12, color="black")
    held = Footprint(wish.config, best.layout, stage=best.stage, **wish.sizes)
    line = Roofline(held, wish.hardware)
    for label, rows, tokens, marker in (
        *((f"decode {b}", b, 1, "o") for b in BATCHES[::5]),
        ("prefill 512", 1, 512, "^"),
    ):
        ideal = line.limited_by(LIMIT).step(rows, tokens, wish.context)
        flops, bytes_ = ideal.arithmetic * peak, (ideal.weights + ideal.cache) * chip.bandwidth
        seconds = line.step(rows, tokens, wish.context).total
        at = flops / bytes_, flops / seconds / 1e12
        axes.plot(*at, marker)
        axes.annotate(label, at, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(title=f"roofline of {best.words}", xscale="log", yscale="log")
    axes.set(xlabel="operations per byte", ylabel="10^12 operations/s of a device")
    axes.grid(alpha=0.3)


def _devices(axes, best: Mesh) -> None:
    """A square for every device: a row for each replica and stage, its place along the axes."""
    across = best.layout.tensor_degree
    rows = best.layout.data * best.stage
    colours = np.arange(across)[None, :].repeat(rows, axis=0)
    axes.imshow(colours, cmap="viridis", aspect="auto", alpha=0.6)
    names: Sequence[str] = [a for a in AXES[1:] if best.layout.shape[a] > 1]
    for column, place in enumerate(np.ndindex(*best.layout.sizes[1:])):
        where = dict(zip(AXES[1:], place, strict=True))
        text = "\n".join(f"{a} {n}" for a, n in where.items() if a in names) or "tensor 0"
        if rows * across <= 64:
            for row in range(rows):
                axes.text(column, row, text, ha="center", va="center", fontsize=7)
    words = [
        f"data {r // best.stage}" + f", stage {r % best.stage}" * (best.stage > 1)
        for r in range(rows)
    ]
    axes.set_yticks(range(rows), words if rows <= 32 else [""] * rows)
    axes.set_xticks([])
    axes.set_title(f"{best.words}: {rows * across} devices")
