"""What a compiled step does against what its plan states, with the name of what differs.

The plan is asked for nothing but the sizes of its mesh and what was left whole on purpose: what is
expected follows from the architecture (`tpjax.planner`), so that wrong rules cannot excuse
themselves.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tpjax.audit import program
from tpjax.audit.program import Collective
from tpjax.config import itemsize
from tpjax.executables import Executables
from tpjax.inventory import Weight, weights
from tpjax.ops.sample import collectives as sampler_states
from tpjax.ops.tiles import TILE
from tpjax.ops.topk import CANDIDATES
from tpjax.parallel.layout import Layout, bytes_summed, module_of
from tpjax.planner.memory import MIB, Footprint, temporary

WIDENED = 4 * TILE  # bytes of a tile in float32, twice
SLACK = 32 * MIB  # of temporaries, beside 10 %


@dataclass(frozen=True)
class Finding:
    """``rule``: what is broken; ``where``: the module, weight or array; ``text``: how."""

    rule: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.text}"


@dataclass(frozen=True)
class Sum:
    """An all-reduce the plan states."""

    where: str
    bytes: int
    axes: frozenset[str]


class Audit:
    """One compiled step, ``decode[b8]`` or ``prefill[t512]``. ``greedy``: its sampler was compiled
    for nothing else."""

    def __init__(self, compiled, exe: Executables, name: str, greedy: bool = False):
        self.compiled, self.exe, self.name, self.greedy = compiled, exe, name, greedy
        self.config, self.plan = exe.table.config, exe.table.plan
        kind, number, (self.context,) = exe.parsed(name)
        self.decode = kind == "decode"
        self.rows, self.tokens = (number, 1) if self.decode else (self.plan.data, number)
        self.each = self.rows // self.plan.data  # of every replica
        shape = dict(self.plan.mesh.shape)
        self.layout = Layout.of(**shape).fit(self.config)
        if self.plan.unsplit:
            self.layout = Layout(self.layout.sizes, self.layout.rules, self.plan.unsplit)
        self.stated = tuple(weights(self.config, self.layout))
        self.held = Footprint(self.config, self.layout)
        self.text: str = compiled.as_text()
        self.memory = compiled.memory_analysis()
        self.collectives = program.collectives(self.text, shape)

    @property
    def on_cpu(self) -> bool:
        return self.plan.platform == "cpu"

    @property
    def on_tpu(self) -> bool:
        """Whose compiler rounds what it sums as it likes, sends a few numbers by sums, lays small
        inputs out in tiles, and prefetches weights: then those are no findings."""
        return self.plan.platform == "tpu"

    def findings(self) -> list[Finding]:
        """Everything that is not as stated; nothing, if the step is as its plan says."""
        return [
            *self._arguments(),
            *self._sums(),
            *self._gathers(),
            *self._memory(),
            *self._cache(),
            *self._made(),
        ]

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Rules that say nothing about this target."""
        return ("moves",) if self.on_tpu else ()

    # --- what goes in

    def _arguments(self) -> Iterator[Finding]:
        """Each weight by name: its dtype, its size, and how it is split."""
        stated = {weight.path: weight for weight in self.stated}
        given = {spec.path: spec for spec in self.exe.table.specs}
        for path in stated.keys() ^ given.keys():
            yield Finding("weights", path, "only in the " + ("plan" if path in stated else "model"))
        leaves = self.compiled.input_shardings[0][0]
        for spec, sharding in zip(self.exe.table.specs, leaves, strict=True):
            weight = stated.get(spec.path)
            if weight is None:
                continue
            local = sharding.shard_shape(spec.shape)
            wanted = tuple(d.size // n for d, n in zip(weight.dims, weight.parts, strict=True))
            if local != wanted:
                yield Finding(
                    "weights",
                    spec.path,
                    f"{_by(local)} on each device, the plan splits it {weight.sharding}:"
                    f" {_by(wanted)}",
                )
            if spec.dtype.itemsize != weight.itemsize:
                yield Finding("weights", spec.path, f"{spec.dtype}, not {self.config.dtype}")
        have, expected = self.memory.argument_size_in_bytes, self.arguments_stated
        if abs(have - expected) > (64 << 10 if self.on_tpu else 0):
            yield Finding("memory", "arguments", f"{have} bytes, not {expected}")

    # --- what is communicated

    def sums(self) -> list[Sum]:
        """The all-reduces the plan states: of the embedding, and two in each layer."""
        rows = self.each * self.tokens
        return [
            Sum(where, rows * bytes_summed(self.config, where), axes)
            for where, axes in self.layout.sums(self.config)
        ]

    def _sums(self) -> Iterator[Finding]:
        """Module by module: as many, of as many bytes, over these axes and no others."""
        expected: dict[str, list[Sum]] = {}
        for stated in self.sums():
            expected.setdefault(stated.where, []).append(stated)
        seen: dict[str, list[Collective]] = {}
        for one in self._of_model():
            seen.setdefault(_module(one.where), []).append(one)
        halves = self.plan.sum_algorithm == "rs_ag"
        for where in sorted(expected.keys() | seen.keys(), key=_order):
            stated, found = expected.get(where, []), seen.get(where, [])
            kinds = Counter(one.kind for one in found)
            wanted = Counter({"all-reduce": len(stated)})
            if halves and where != "embed":
                wanted = Counter({"reduce-scatter": len(stated), "all-gather": len(stated)})
            if +kinds != +wanted:
                yield Finding(
                    "collectives", where, f"{_count(kinds)}, the plan states {_count(wanted)}"
                )
                continue
            for one, what in zip(found, stated, strict=False):
                if frozenset(one.axes) != what.axes:
                    yield Finding(
                        "collectives",
                        where,
                        f"{one.kind} over {' x '.join(one.axes) or 'nothing'}, the plan states"
                        f" {' x '.join(sorted(what.axes))}",
                    )
                # A CPU sums 16 bits as 32.
                as_stated = {what.bytes, 2 * what.bytes} if self.on_cpu else {what.bytes}
                as_stated |= {what.bytes // 2} if self.on_tpu else set()
                if not halves and one.bytes not in as_stated:
                    yield Finding(
                        "collectives",
                        where,
                        f"{one.kind} of {one.bytes} bytes ({one.dtype}), not {what.bytes}",
                    )

    def _of_model(self) -> list[Collective]:
        """Those that are not the sampler's: by module, or by what they carry."""
        most = self.plan.mesh.size * self.rows * CANDIDATES * 8
        modules = ("blocks.", "embed", "head")

        def of_sampler(one: Collective) -> bool:
            kind = one.kind == "all-gather" or (self.on_tpu and one.where == "?")
            return kind and one.bytes <= most

        return [
            one for one in self.collectives if one.where.startswith(modules) or not of_sampler(one)
        ]

    def _gathers(self) -> Iterator[Finding]:
        """The sampler's: no more than it states."""
        model = self._of_model()
        count = sum(one not in model for one in self.collectives)
        head = "embed" if self.config.tie_embeddings else "head"
        shards = self.layout.at(head).shards("vocab")
        stated = sampler_states(self.plan.at(head))["all-gather"]
        if self.greedy:  # then its one, and of replicas what every sequence got
            stated = int(shards > 1) + (4 if self.plan.data > 1 else 0)
        # A vocabulary of few candidates per device makes some branches impossible; they vanish.
        few = self.config.vocab // shards <= CANDIDATES
        if self.on_tpu:  # whose compiler may split them
            stated *= 2
        one = self.greedy and self.plan.data == 1
        exact = (one and not self.on_tpu) or (self.on_cpu and not few)
        if count > stated or (exact and count != stated):
            yield Finding("collectives", "sampler", f"{count} all-gathers, it states {stated}")

    # --- what is held

    @property
    def arguments_stated(self) -> int:
        return self.held.arguments(self.each, self.tokens, self.context)

    @property
    def cache_stated(self) -> int:
        return self.held.cache(self.each, self.context)

    @property
    def temporary_stated(self) -> int:
        return temporary(self.config, self.layout, self.each, self.tokens, self.context)

    def _memory(self) -> Iterator[Finding]:
        have, stated = self.memory.temp_size_in_bytes, self.temporary_stated
        limit = max(stated + max(SLACK, stated // 10), 64 * MIB if self.on_cpu else 0)
        if have > limit:
            yield Finding("memory", "temporary", f"{have} bytes, the plan states {stated}")
        experts = [w for w in self.stated if w.dims[0].axis == "experts"]
        if self.rows == self.tokens == 1 and experts:
            matrix = min(w.bytes_per_device * w.parts[0] // w.dims[0].size for w in experts)
            # Scores of a long context, which the plan states, are no expert's.
            beside = 0 if self.on_cpu else self.temporary_stated - MIB
            if matrix <= have - beside and (not self.on_cpu or matrix > WIDENED):
                yield Finding(
                    "memory", "temporary", f"{have} bytes, an expert has {matrix}: it was copied"
                )

    def _cache(self) -> Iterator[Finding]:
        """Every layer's keys and values are updated where they are."""
        leaves = len(self.exe.table.specs)
        places = program.aliased(self.text)
        for n in range(self.config.layers):
            for part, name in enumerate(("keys", "values")):
                if leaves + 2 * n + part not in places:
                    yield Finding(
                        "cache", f"blocks.{n}.attn", f"its {name} are not updated in place"
                    )
        have, cache = self.memory.alias_size_in_bytes, self.cache_stated
        if have != cache:
            yield Finding("cache", "all layers", f"{have} bytes in place, the cache has {cache}")

    # --- what is made

    def _made(self) -> Iterator[Finding]:
        """No weight is copied, sliced, widened or gathered; nothing large is moved."""
        if self.on_tpu:
            return
        by_shape: dict[tuple[int, ...], list[Weight]] = {}
        for weight in self.stated:
            if len(weight.dims) > 1:
                local = [d.size // n for d, n in zip(weight.dims, weight.parts, strict=True)]
                whole = [d.size for d in weight.dims]
                for sizes in (local, whole, local[1:] if len(local) == 3 else local):
                    by_shape.setdefault(_sizes(sizes), []).append(weight)
        layouts = [self.layout.at(f"blocks.{n}.attn") for n in range(self.config.layers)]
        held = {here: here.heads(self.config) for here in layouts}
        queries = self.config.head_dim * max(
            len(heads.queries) // here.shards("heads") for here, heads in held.items()
        )
        # New queries and keys of a prompt may be transposed, head by head.
        size = itemsize(self.config.dtype)
        limit = max(MIB, self.each * self.tokens * queries * size if not self.decode else 0)
        told, slices = set(), self._slices_of_experts()
        caches = {
            _sizes(
                (
                    self.each,
                    len(heads.kv) // here.shards("kv_heads"),
                    self.context,
                    self.config.head_dim,
                )
            )
            for here, heads in held.items()
        }
        for one in program.made(self.text):
            sizes = _sizes(one.array.shape)
            alike = by_shape.get(sizes, []) if self.tokens not in sizes or self.decode else []
            weight = _of_module(one.where, alike)
            if one.where.endswith(".attn.cache") and sizes in caches and not one.moves:
                continue  # a layer's keys or values, written where they are: see _cache
            if sizes in slices and not one.where.endswith(("attn", "mlp")):
                continue
            if one.moves and one.array.bytes > limit:
                where = weight.path if weight else one.where
                found = Finding("moves", where, f"a {one.kind} of {one.array}")
            elif weight is not None and not self.on_cpu and one.array.bytes > MIB and not one.fused:
                found = Finding(
                    "moves", weight.path, f"{one.kind} makes {one.array} at {one.where}"
                )
            elif weight is not None and not self.on_cpu and one.moves and one.array.bytes > MIB:
                found = Finding("moves", weight.path, f"a {one.kind} of {one.array} at {one.where}")
            else:
                continue
            if str(found) not in told:
                told.add(str(found))
                yield found

    def _slices_of_experts(self) -> set[tuple[int, ...]]:
        """What may be cut out of the experts: one of them, where its rows are multiplied together
        (the plan states their bytes as temporary)."""
        moe = self.config.moe
        experts = [w for w in self.stated if w.dims[0].axis == "experts"]
        if moe is None or not experts:
            return set()
        local = experts[0].dims[0].size // experts[0].parts[0]
        if not self.on_cpu and moe.pair_by_pair(self.each * self.tokens, local):
            return set()
        return {
            _sizes(d.size // n for d, n in zip(w.dims[1:], w.parts[1:], strict=True))
            for w in experts
        }


def _of_module(where: str, alike: list[Weight]) -> Weight | None:
    """Of weights of one shape that of a module; any, where nobody knows the module."""
    module = _module(where)
    known = module.startswith(("blocks.", "embed", "head", "sampler"))
    return next((w for w in alike if not known or module_of(w.path) == module), None)


def _module(where: str) -> str:
    """``blocks.3.attn`` of ``blocks.3.attn.o``."""
    parts = where.split(".")
    return ".".join(parts[:3]) if parts[0] == "blocks" else where


def _order(where: str):
    parts = where.split(".")
    return (int(parts[1]), parts[2]) if parts[0] == "blocks" else (-1, where)


def _count(kinds: Counter) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()) if n) or "none"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _sizes(shape) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))
