"""How long a step takes on hardware nobody has rented yet: a roofline, launches, all-reduces.

Seconds throughout. The formulas are the usual ones: memory, arithmetic and communication bounds of
a transformer's layers. What software makes of the hardware is a `Stack`, whose numbers come from
published measurements (BENCHMARKS.md, "Predictions beside published measurements").

B sequences of one replica, S cache positions, T tokens, L layers, D embed.
"""

import copy
import math
from dataclasses import dataclass

from tpjax.buckets import CHUNKS
from tpjax.config import ModelConfig
from tpjax.inventory import Weight
from tpjax.planner.chips import Hardware, Link
from tpjax.planner.memory import USABLE, Footprint

WORKSPACE = 1.5e9  # bytes that systems keep for activations and graphs
MOST_ROWS = 4096  # sequences at once


@dataclass(frozen=True)
class Stack:
    """What software reaches. ``weights``, ``cache``: share of the memory's bandwidth while reading
    these. ``arithmetic``: share of the peak rate. ``layer``: seconds a layer takes beyond that
    (launches, small kernels); ``step``: the same of everything that is not a layer. ``one_shot``:
    whether small all-reduces are written straight into the other devices' memory. ``sum_bytes``: of
    an element that is summed. ``prefetch``: whether the next weights are read while devices sum.
    ``chunk``: tokens prefilled per call. ``memory``: share of a device's memory that weights and
    cache may take."""

    name: str
    weights: float = 0.90
    cache: float = 0.60
    arithmetic: float = 0.75
    layer: float = 40e-6
    step: float = 100e-6
    one_shot: bool = True
    sum_bytes: int = 2
    prefetch: bool = False
    chunk: int = CHUNKS[-1]
    memory: float = USABLE


# XLA's decode step has about 20 kernels per layer, some 2 us each beside what they read; sums are
# in float32. Not measured on a GPU yet.
TPJAX = Stack("tpjax", layer=50e-6, one_shot=True, sum_bytes=4)
# Nothing but the hardware: every byte once at the full bandwidth, every sum free.
LIMIT = Stack("limit", 1.0, 1.0, 1.0, layer=0.0, step=0.0)


@dataclass(frozen=True)
class Step:
    """Seconds of one step by cause. Weights are read while they are multiplied; all else adds."""

    weights: float
    arithmetic: float
    cache: float
    communication: float
    launch: float

    @property
    def total(self) -> float:
        return max(self.weights, self.arithmetic) + self.cache + self.communication + self.launch

    def share(self, part: str) -> float:
        """Of the total; ``memory`` is weights and cache."""
        if part == "memory":
            read = self.weights if self.weights >= self.arithmetic else 0.0
            return (read + self.cache) / self.total
        if part == "arithmetic":
            return self.arithmetic / self.total if self.arithmetic > self.weights else 0.0
        return getattr(self, part) / self.total

    def __add__(self, other: "Step") -> "Step":
        return Step(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


NOTHING = Step(0.0, 0.0, 0.0, 0.0, 0.0)


class Roofline:
    """One replica of a model on some devices: what its steps cost. ``dtype``: of the operands, if
    it is not the model's."""

    def __init__(
        self,
        held: Footprint,
        hardware: Hardware,
        stack: Stack = TPJAX,
        dtype: str | None = None,
    ):
        config, layout = held.config, held.layout
        self.held, self.config, self.layout, self.stage = held, config, layout, held.stage
        self.hardware, self.stack = hardware, stack
        self.kv_per_token = held.per_token
        self.peak = hardware.chip.peak(dtype or config.dtype)
        self.sums = len(layout.sums(config))
        self.read = 0.0  # bytes of what every token is multiplied with
        self.experts = 0.0  # bytes of all experts here
        self.products = 0.0  # elements a token is multiplied with here
        self.head = 0.0  # those that make logits
        self.local_experts = 1
        self.heads = 0  # query heads of all layers here
        for n in range(config.layers):
            here = layout.at(f"blocks.{n}.attn")
            self.heads += len(here.heads(config).queries) // here.shards("heads")
            if not layout.unsplit:
                self.heads *= config.layers
                break
        moe = config.moe
        for weight in held.inventory:
            if not multiplied(weight, config):
                continue
            elements = weight.bytes_per_device / weight.itemsize
            if weight.path in ("head", "embed.w"):  # of the last token only
                self.read += weight.bytes_per_device
                self.head += elements
            elif moe is not None and weight.dims[0].axis == "experts":
                self.experts += weight.bytes_per_device
                self.local_experts = weight.dims[0].size // weight.parts[0]
                self.products += elements * moe.per_token / moe.experts
            else:
                self.read += weight.bytes_per_device
                self.products += elements

    def step(self, rows: int, tokens: int, context: int) -> Step:
        """``tokens`` tokens of each of ``rows`` sequences, which see ``context`` positions. With
        stages: the time in which every stage has done its part for these."""
        c, stack, chip = self.config, self.stack, self.hardware.chip
        many = rows * tokens
        bytes_ = self.read
        if c.moe is not None:
            untouched = (1 - c.moe.per_token / c.moe.experts) ** many
            # The busiest device decides, and every device reads one of its own at least.
            bytes_ += self.experts * max(1 - untouched, 1 / self.local_experts)
        scores = 4 * many * context * self.heads * c.head_dim
        flops = 2 * (many * self.products + rows * self.head) + scores
        weights = bytes_ / (stack.weights * chip.bandwidth)
        arithmetic = flops / (stack.arithmetic * self.peak)
        communication = self._communication(many)
        if stack.prefetch:  # what reading does not hide
            communication = max(communication - max(weights - arithmetic, 0.0), 0.0)
        return Step(
            weights=weights,
            arithmetic=arithmetic,
            cache=rows * context * self.kv_per_token / (stack.cache * chip.bandwidth),
            communication=communication,
            launch=c.layers * stack.layer + self.stage * stack.step,
        )

    def _communication(self, many: int) -> float:
        degree = self.layout.tensor_degree
        if self.stack == LIMIT:
            return 0.0
        bytes_ = many * self.config.embed * self.stack.sum_bytes
        time = self.sums * self._all_reduce(bytes_, degree)
        if self.stage > 1:  # what goes from one stage to the next
            link = self.hardware.link(degree * self.stage)
            time += (self.stage - 1) * (10e-6 + bytes_ / (0.8 * link.gbs * 1e9))
        return time

    def _all_reduce(self, bytes_: float, degree: int) -> float:
        inside = degree
        if self.hardware.crosses(degree):
            inside = math.gcd(degree, self.hardware.devices)
        nodes = degree // inside
        link = self.hardware.chip.link
        time = all_reduce(bytes_, inside, link, self.stack.one_shot)
        if nodes > 1:  # each device has the sum of a part of the bytes, and exchanges that
            time += all_reduce(bytes_ / inside, nodes, self.hardware.chip.network, False, 40e-6)
        return time

    def decode(self, rows: int, context: int) -> Step:
        """One token of every sequence."""
        return self.step(rows, 1, context)

    def prefill(self, tokens: int, context: int | None = None) -> Step:
        """One prompt, in chunks. ``context``: positions every chunk attends to; by default those
        there are by then."""
        done, total = 0, NOTHING
        while done < tokens:
            chunk = min(self.stack.chunk, tokens - done)
            done += chunk
            total += self.step(1, chunk, context or done - chunk // 2)
        return total

    def throughput(self, prompt: int, output: int) -> float:
        """Tokens per second, in all, with as many sequences at once as have room for the whole of
        their prompts and outputs. Every prompt is prefilled once while the others wait."""
        chip = self.hardware.chip
        free = self.stack.memory * chip.memory - self.held.ends - self.held.layers - WORKSPACE
        rows = min(int(free / ((prompt + output) * self.kv_per_token)), MOST_ROWS)
        if rows < 1:
            return 0.0
        each = self.step(1, prompt, prompt // 2)
        token = self.decode(rows, prompt + output // 2).total
        waiting = rows * (each.arithmetic + each.communication)
        return output * rows / (output * token + waiting)

    def limited_by(self, stack: Stack) -> "Roofline":
        """The same devices under other software."""
        other = copy.copy(self)
        other.stack = stack
        return other


def multiplied(weight: Weight, config: ModelConfig) -> bool:
    """Whether a token is multiplied with it, which reads it; tables are looked up, unless they make
    the logits too."""
    if weight.path == "embed.w":
        return config.tie_embeddings
    return len(weight.dims) > 1 and weight.path != "positions"


def all_reduce(
    bytes_: float, n: int, link: Link, one_shot: bool, latency: float | None = None
) -> float:
    """Seconds for a sum over ``n`` devices, the fastest of the ways there are.

    One-shot: everybody writes all to everybody (5.5 us, as vLLM's custom all-reduce on H100 shows).
    Ring: NCCL's latencies of a small message (6.6 us and 0.6 us a hop, with twice the bytes) and of
    a large one (8.4 us, 1.9 us a hop), from its tuning tables. Without direct access data goes
    through the host: half the bandwidth, three times the latency.
    """
    if n == 1:
        return 0.0
    wire = (0.83 if link.direct else 0.42) * link.gbs * 1e9
    slow = 1.0 if link.direct else 3.0
    ring = 2 * (n - 1) / n * bytes_ / wire
    small = slow * (6.6e-6 + 2 * (n - 1) * 0.6e-6) + 2 * ring
    large = slow * (8.4e-6 + 2 * (n - 1) * 1.9e-6) + ring
    ways = [small, large] if latency is None else [latency + ring]
    if one_shot and link.direct:
        ways += [5.5e-6 + (n - 1) * bytes_ / wire, 11e-6 + ring]
    return min(ways)
