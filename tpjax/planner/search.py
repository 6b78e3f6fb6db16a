"""Every sensible mesh for a model on some hardware: whether it fits, how fast it can be; ranked."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tpjax.config import ModelConfig
from tpjax.errors import UsageError
from tpjax.parallel.degrees import even_degrees, nearest, refusal
from tpjax.parallel.layout import Layout, bytes_summed
from tpjax.patterns import Patterns, decide
from tpjax.planner.chips import Hardware
from tpjax.planner.memory import Footprint, Memory, usable
from tpjax.planner.roofline import LIMIT, TPJAX, Roofline, Stack, Step

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8": 1}
GOALS = ("latency", "throughput", "memory")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to run. ``batch``: sequences at once, all replicas together; ``context``: positions
    of each."""

    config: ModelConfig
    hardware: Hardware
    context: int
    batch: int = 1
    prompt: int = 512
    weight_dtype: str = ""  # by default the model's
    cache_dtype: str = ""
    axes: dict[str, int] = field(default_factory=dict)  # sizes that are given
    patterns: Patterns = ()
    allow: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, Any]:
        return {"weight_bytes": self.weight_bytes, "kv_bytes": _SIZES.get(self.cache_dtype)}

    @property
    def weight_bytes(self) -> int | None:
        """Of an element of what is multiplied, if it is not the model's dtype."""
        return 1 if _SIZES.get(self.weight_dtype) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """One mesh and what is known of it. Bytes are per device, seconds of one step; rates in tokens
    per second."""

    layout: Layout
    stage: int
    memory: Memory
    fits: bool
    most_batch: int  # at the context
    longest_context: int  # at the batch
    decode: Step
    prefill: Step  # of one prompt: the time to its first token
    per_user: float
    total: float
    share_of_limit: float
    sums: int  # all-reduces per token
    sum_bytes: int  # bytes summed per token of each sequence
    padding: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def words(self) -> str:
        """``data=2 x tensor=4``: the axes that are more than one."""
        shape = {"data": self.layout.data, "stage": self.stage} | {
            a: n for a, n in self.layout.shape.items() if a != "data"
        }
        return words({a: n for a, n in shape.items() if n > 1}) or "tensor=1"


@dataclass(frozen=True)
class Refused:
    """A mesh that makes no sense, the rule it breaks, and what would."""

    words: str
    why: str


def meshes(wish: Wish, stack: Stack = TPJAX) -> tuple[list[Mesh], list[Refused]]:
    """All that use every device, or those of the axes given. Raises UsageError for given axes that
    are not the number of devices."""
    n, given = wish.hardware.total, wish.axes
    product, asked = math.prod(given.values()), words(given) or "no axis"
    if n % product:
        raise UsageError(f"{asked} does not make {wish.hardware}: {product} of {n} devices")
    found, refused = [], []
    for data, stage, expert, tensor in _splits(n, wish):
        sizes = {"data": data, "stage": stage, "expert": expert, "tensor": tensor}
        if any(sizes[axis] != size for axis, size in given.items()):
            continue
        name = words({a: s for a, s in sizes.items() if s > 1}) or "tensor=1"
        if why := refusal(wish.config, expert, tensor, 1):
            near = nearest(wish.config, expert, expert * tensor)
            refused.append(Refused(name, f"{why}: {near}"))
        elif wish.config.layers % stage:
            refused.append(
                Refused(name, f"stage={stage} does not divide {wish.config.layers} layers")
            )
        else:
            layout = Layout.of(data=data, expert=expert, tensor=tensor).fit(wish.config)
            try:
                if wish.patterns:
                    layout = decide(wish.config, layout, wish.patterns, wish.allow).applied(layout)
            except UsageError as error:
                refused.append(Refused(name, str(error)))
                continue
            found.append(consider(wish, layout, stage, stack))
    if not found:
        if not refused:
            raise UsageError(f"{asked} does not make {wish.hardware}: {product} of {n} devices")
        why = "; ".join(dict.fromkeys(mesh.why for mesh in refused))
        raise UsageError(f"no mesh of {wish.hardware} suits this model: {why}")
    return found, refused


def words(sizes: dict[str, int]) -> str:
    """``data=2 x tensor=4``."""
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())


def _splits(n: int, wish: Wish) -> Iterator[tuple[int, int, int, int]]:
    def divisors(m: int) -> list[int]:
        return [d for d in range(1, m + 1) if m % d == 0]

    for data in divisors(n):
        for stage in divisors(n // data):
            mixture = wish.config.moe is not None or "expert" in wish.axes
            for expert in divisors(n // data // stage) if mixture else [1]:
                yield data, stage, expert, n // data // stage // expert


def consider(wish: Wish, layout: Layout, stage: int, stack: Stack = TPJAX) -> Mesh:
    """What one mesh means for the wish."""
    config, hardware = wish.config, wish.hardware
    rows = -(-wish.batch // layout.data)
    held = Footprint(config, layout, stage=stage, **wish.sizes)
    now, most = held.memory(rows, wish.context), usable(hardware.chip)
    line = Roofline(held, hardware, stack)
    # With stages, a batch is cut so that each stage always has a part of it.
    parts = min(stage, rows)
    step = line.decode(-(-rows // parts), wish.context)
    token = step.total
    best = line.limited_by(LIMIT).decode(-(-rows // parts), wish.context).total
    return Mesh(
        layout=layout,
        stage=stage,
        memory=now,
        fits=now.total <= most,
        most_batch=held.most_rows(wish.context, most) * layout.data,
        longest_context=held.longest_context(rows, most),
        decode=step,
        prefill=line.prefill(wish.prompt, max(wish.context, wish.prompt)),
        per_user=1 / token,
        total=wish.batch / token,
        share_of_limit=best / step.total,
        sums=line.sums,
        sum_bytes=sum(bytes_summed(config, where) for where, _ in layout.sums(config)),
        padding=padding(config, layout),
        warnings=tuple(_warnings(wish, layout, stage)),
    )


def padding(config: ModelConfig, layout: Layout) -> tuple[str, ...]:
    """What this layout pads or copies, and why."""
    heads, moe, out = layout.heads(config), config.moe, []
    split = [
        ("heads", config.heads, len(heads.queries)),
        ("kv_heads", config.kv_heads, len(heads.kv)),
        ("vocab", config.vocab, layout.dim("vocab", config.vocab).size),
    ]
    if not all(map(config.is_sparse, range(config.layers))):
        split.append(("mlp", config.mlp, layout.dim("mlp", config.mlp).size))
    if moe is not None:
        split.append(("experts", moe.experts, layout.dim("experts", moe.experts).size))
        split.append(("expert_mlp", moe.mlp, layout.dim("expert_mlp", moe.mlp).size))
    out += [f"{axis} {a} to {b}" for axis, a, b in split if a != b]
    copies = layout.shards("heads") // layout.shards("kv_heads")
    if copies > 1:
        more = layout.tensor_degree > config.kv_heads
        why = "more devices than" if more else "does not divide"
        out.append(f"kv_heads on {copies} devices each ({why} {config.kv_heads})")
    return tuple(out)


def _warnings(wish: Wish, layout: Layout, stage: int) -> Iterator[str]:
    hardware, degree = wish.hardware, layout.tensor_degree
    link, network = hardware.chip.link, hardware.chip.network
    if hardware.crosses(degree):
        yield (
            f"its sums cross nodes: {network.kind}, {network.gbs:g} GB/s a device, where inside"
            f" a node {link.kind} has {link.gbs:g}"
        )
    elif degree > 1 and not link.direct:
        yield f"its sums go through the host: {link.kind}, {link.gbs:g} GB/s"
    if stage > 1:
        yield "tpjax does not run stages yet: planned only"
    if wish.weight_bytes == 1:
        yield "tpjax does not run 8 bits yet: planned only"
    if wish.cache_dtype not in ("", wish.config.dtype):
        yield "tpjax's cache has the model's dtype: another is planned only"


def rank(found: list[Mesh], goal: str) -> list[Mesh]:
    """Best first: those that fit, by the goal; then the others by how little is missing.

    latency: tokens per second of one user; throughput: of all users; memory: bytes on a device.
    Meshes that tpjax does not run yet come after those that it runs.
    """

    def key(mesh: Mesh):
        if not mesh.fits:
            return True, False, mesh.memory.total
        by = {"latency": -mesh.per_user, "throughput": -mesh.total, "memory": mesh.memory.total}
        return False, mesh.stage > 1, by[goal]

    return sorted(found, key=key)


def explained(ranked: list[Mesh], goal: str, wish: Wish) -> str:
    """One sentence about the winner."""
    best, config = ranked[0], wish.config
    if not best.fits:
        needed, there = best.memory.total / 1e9, usable(wish.hardware.chip) / 1e9
        return (
            f"nothing fits: the nearest is {best.words}, which needs {needed:.1f} GB of {there:.1f}"
            " on each device; take more devices, fewer sequences, a shorter context or a smaller"
            " dtype"
        )
    step = best.decode
    parts = {p: step.share(p) for p in ("memory", "arithmetic", "communication", "launch")}
    most = max(parts, key=lambda part: parts[part])
    of = {
        "latency": f"{best.per_user:.0f} tokens/s for a user",
        "throughput": f"{best.total:.0f} tokens/s in all",
        "memory": f"{best.memory.total / 1e9:.1f} GB on a device",
    }[goal]
    others = [m for m in ranked[1:] if m.fits and m.stage == 1]
    beside = f"; next is {others[0].words}" if others else "; nothing else that runs fits"
    even = even_degrees(config)
    hint = ""
    if best.padding and best.layout.tensor_degree not in even:
        less = [d for d in even if d < best.layout.tensor_degree]
        hint = f"; tensor={max(less)} would need no padding" if less else ""
    return (
        f"{best.words}: {of}, {parts[most]:.0%} of a step is {most}, {best.share_of_limit:.0%} of"
        f" the hardware's limit{beside}{hint}"
    )
