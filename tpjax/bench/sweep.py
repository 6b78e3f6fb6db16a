"""`tpjax bench decode --sweep`: what a decode step costs at other batches, contexts or degrees.

A step's time does not depend on what the cache holds, so a step at a context is measured without
the tokens before it. Every round measures every point once, in turn. What a step should cost is
``launch + sequence B + position B S`` for B sequences at context S, its three numbers fitted to all
points (the fit that leaves the smallest relative errors): weights and everything fixed, work per
sequence, and reading the cache.

Where degrees are compared, the same step without the sums of its layers is measured beside it: what
it is faster by is the share of communication.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tpjax import picture
from tpjax.errors import RunError, UsageError

if TYPE_CHECKING:
    from tpjax.cache import KVCache
    from tpjax.engine.llm import LLM
    from tpjax.executables import Executables


AXES = ("tensor", "batch", "context")
_LEFT_OUT = "left out"
STEPS = 4  # of a dispatch that is measured
VALUES = {
    "tensor": (1, 2, 4, 8),
    "batch": (1, 2, 4, 8, 16, 32),
    "context": (128, 512, 1024, 2048, 4096, 8192),
}


class Point(NamedTuple):
    """Where a step is measured."""

    tensor: int
    batch: int
    context: int


def points(args: argparse.Namespace) -> list[Point]:
    """What is asked for: every combination of the axes' values. Raises UsageError for an axis that
    is not known, or a value that cannot be."""
    values = {
        "tensor": (args.tensor_parallel_size or 1,),
        "batch": (args.batch,),
        "context": (args.prompt_length + args.max_tokens,),
    }
    for given in args.sweep.split(","):
        axis, _, listed = given.partition("=")
        if axis not in AXES:
            raise UsageError(f"--sweep {axis}: known are {', '.join(AXES)}")
        try:
            numbers = tuple(int(n) for n in listed.split("/")) if listed else VALUES[axis]
        except ValueError:
            raise UsageError(f"--sweep {given}: write {axis}=1/2/4") from None
        if min(numbers) < (STEPS + 1 if axis == "context" else 1):
            raise UsageError(f"--sweep {given}: {min(numbers)} is too small")
        values[axis] = tuple(sorted(set(numbers)))
    if len(values["tensor"]) > 1 and (args.data_parallel_size or 1) > 1:
        raise UsageError("--sweep tensor: give no --data-parallel-size")
    return [
        Point(t, b, c) for t in values["tensor"] for b in values["batch"] for c in values["context"]
    ]


class Measured(NamedTuple):
    """Seconds of a step at a point, one for every round; ``bare``: without the layers' sums."""

    point: Point
    seconds: list[float]
    bare: list[float]


def measure(wanted: Sequence[Point], rounds: int, make: Callable[[int], "LLM"]) -> list[Measured]:
    """Steps at every point. ``make``: a model of that degree."""
    from tpjax.executables import compiles

    models = {tensor: make(tensor) for tensor in dict.fromkeys(p.tensor for p in wanted)}
    programs = {tensor: [llm.executables] for tensor, llm in models.items()}
    with _sums_left_out():
        for tensor in (t for t in models if len(models) > 1 and t > 1):
            programs[tensor].append(_without_sums(models[tensor]))
        measured = [Measured(point, [], []) for point in wanted]
        caches = _Caches(models)
        turns = [
            (into, _step(exe, models[point.tensor].weights, point, caches))
            for point, *times in measured
            for into, exe in zip(times, programs[point.tensor], strict=False)
        ]
        for _, step in turns:
            step()
    before = compiles.count
    for _ in range(rounds):
        for into, step in turns:
            into.append(step())
    if compiles.count != before:
        raise RunError(f"{compiles.count - before} compiles happened while measuring")
    return measured


@contextlib.contextmanager
def _sums_left_out() -> Iterator[None]:
    """Plans may ask for it in here, and be traced."""
    from tpjax.parallel import collectives

    collectives.SUMS[_LEFT_OUT] = collectives.left_out
    try:
        yield
    finally:
        del collectives.SUMS[_LEFT_OUT]


def _without_sums(llm: "LLM") -> "Executables":
    """The model's steps without the sums of its layers."""
    from tpjax.executables import Executables
    from tpjax.weights import WeightTable

    plan = replace(llm.plan, sum_algorithm=_LEFT_OUT)
    return Executables(WeightTable(llm.config, plan), llm.executables.buckets)


class _Caches:
    """Caches by degree and sequences. They stay as long as there is room: a machine that is asked
    for gigabytes, or given them back, is slow for seconds."""

    def __init__(self, models: "dict[int, LLM]"):
        self._models = models
        self._held: dict[tuple[int, int], KVCache] = {}

    def take(self, tensor: int, batch: int) -> "KVCache":
        """A cache for so many sequences, the caller's until it is put back."""
        import jax

        from tpjax.cache import KVCache
        from tpjax.engine.memory import free

        if (tensor, batch) in self._held:
            return self._held.pop((tensor, batch))
        llm = self._models[tensor]
        context = llm.executables.buckets.context
        wanted = KVCache.bytes_per_device(llm.config, llm.plan, batch, context)
        while self._held and wanted + llm.memory.temporary > free(llm.plan):
            del self._held[next(iter(self._held))]  # the one that waited longest
        return jax.block_until_ready(llm.executables[f"zeros[b{batch}]"]())

    def put(self, tensor: int, batch: int, cache: "KVCache") -> None:
        self._held[tensor, batch] = cache


def _step(exe: "Executables", weights, point: Point, caches: _Caches) -> Callable[[], float]:
    """Runs a few steps up to the context; seconds of one."""
    import jax
    import numpy as np

    from tpjax import sampling
    from tpjax.params import Row, SamplingParams

    batch = exe.buckets.batch_for(point.batch)
    params = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)
    row = Row(1, point.context - STEPS - 1, STEPS, 0, params, ())
    rows = [row if n < point.batch else None for n in range(batch)]
    packed, limit = exe.upload(sampling.pack(rows)), exe.upload(np.asarray(STEPS, np.int32))

    def run() -> float:
        cache, decode = caches.take(point.tensor, batch), exe[f"decode[b{batch}]"]
        start = time.perf_counter()
        cache, drawn, _ = decode(weights, cache, packed, limit)
        jax.block_until_ready(drawn)
        seconds = time.perf_counter() - start
        caches.put(point.tensor, batch, cache)
        return seconds / STEPS

    return run


def fitted(medians: dict[Point, float]) -> dict[Point, float]:
    """What the model of the cost gives at every point, with the numbers that fit all of a degree
    best."""
    import numpy as np

    fit = {}
    for tensor in {point.tensor for point in medians}:
        here = {point: t for point, t in medians.items() if point.tensor == tensor}
        terms = np.array([[1.0, p.batch, p.batch * p.context] for p in here])
        times = np.array(list(here.values()))
        # Relative errors count, and columns of one unit: milliseconds and thousands of positions.
        scale = np.array([1.0, 1.0, 1e-3])
        found, *_ = np.linalg.lstsq(terms * scale / times[:, None], np.ones(len(times)), rcond=None)
        fit |= dict(zip(here, (terms * scale) @ found, strict=True))
    return fit


def report(measured: list[Measured], bytes_at: Callable[[Point], tuple[int, int]]) -> dict:
    """The points as a program reads them. ``bytes_at``: what a step reads on all devices, and what
    one device holds for it."""
    medians = {point: statistics.median(seconds) for point, seconds, _ in measured}
    fit = fitted(medians)
    found = [
        {
            **point._asdict(),
            "ms_per_step": round(medians[point] * 1e3, 3),
            "ms_spread": [round(t * 1e3, 3) for t in (min(seconds), max(seconds))],
            "tok_s": round(point.batch / medians[point], 2),
            "bytes_per_step": bytes_at(point)[0],
            "bytes_per_device": bytes_at(point)[1],
            "sums_share": _share(seconds, bare),
            "fit_ms": round(float(fit[point]) * 1e3, 3),
            "beyond_fit": round(float(medians[point] / fit[point]) - 1, 3),
        }
        for point, seconds, bare in measured
    ]
    return {"points": found, "worst_beyond_fit": max(p["beyond_fit"] for p in found)}


def _share(seconds: list[float], bare: list[float]) -> float | None:
    """Of a step's time what its sums take, round by round; null where that was not measured."""
    each = [1 - without / t for t, without in zip(seconds, bare, strict=False)]
    return round(statistics.median(each), 3) if each else None


def plot(file: Path, result: dict) -> None:
    """Measured steps, the fit, and what the probed bandwidth would allow; what a device holds, and
    the share of communication where it was measured."""
    from matplotlib.figure import Figure

    points = result["sweep"]["points"]
    axis = max(AXES, key=lambda name: (len({p[name] for p in points}), name == "context"))
    others = [name for name in AXES if name != axis]
    shares = any(p["sums_share"] is not None for p in points)
    figure = Figure(figsize=(16 + 5 * shares, 5), layout="constrained")
    figure.suptitle(f"decode of {Path(result['model']).stem}, {result['dtype']}")
    time_, rate, memory, *rest = figure.subplots(1, 3 + shares)
    for n, key in enumerate(dict.fromkeys(tuple(p[name] for name in others) for p in points)):
        line = [p for p in points if tuple(p[name] for name in others) == key]
        at, color = [p[axis] for p in line], f"C{n % 10}"
        label = ", ".join(f"{name} {value}" for name, value in zip(others, key, strict=True))
        limits = [p["bytes_per_step"] / result["read_bandwidth"] for p in line]
        time_.plot(at, [p["ms_per_step"] for p in line], "o", color=color, label=label)
        time_.plot(at, [p["fit_ms"] for p in line], "-", color=color)
        time_.plot(at, [limit * 1e3 for limit in limits], ":", color=color)
        rate.plot(at, [p["tok_s"] for p in line], "o-", color=color)
        rate.plot(at, [p["batch"] / t for p, t in zip(line, limits, strict=True)], ":", color=color)
        memory.plot(at, [p["bytes_per_device"] / 1e9 for p in line], "o-", color=color)
        for axes in rest:
            axes.plot(at, [100 * (p["sums_share"] or 0) for p in line], "o-", color=color)
    time_.set(ylabel="ms a step: measured, fit (-), limit of the memory (:)")
    rate.set(ylabel="tokens/s: measured, limit of the memory (:)")
    memory.set(ylabel="weights and cache of one device, GB", ylim=(0, None))
    for axes in rest:
        axes.set(ylabel="share of the sums over devices in a step, %")
    for axes in (time_, rate):
        wide = axes.dataLim.y1 > 5 * axes.dataLim.y0
        axes.set(yscale="log") if wide else axes.set(ylim=(0, None))
    for axes in (time_, rate, memory, *rest):
        axes.set(xlabel=axis, xscale="log")
        axes.set_xticks([p[axis] for p in points], [str(p[axis]) for p in points], minor=False)
        axes.minorticks_off()
    time_.legend(fontsize="small")
    picture.save(figure, file)
