"""Executables: one per bucket, built ahead of time, counted, and kept on disk.

The set is finite and known from `Buckets` before the first request.
"""

import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpjax import env, kept, native, sampling, step
from tpjax.buckets import DISPATCH, Buckets
from tpjax.cache import KVCache
from tpjax.ops.sample import Drawn
from tpjax.weights import WeightTable


@dataclass(frozen=True)
class Built:
    """One executable and what it took to build. ``from_cache``: nothing was compiled."""

    run: jax.stages.Compiled
    seconds: float
    from_cache: bool


OnBuild = Callable[[str, int, int], Callable[[Built], None]]


def silent(name: str, number: int, total: int) -> Callable[[Built], None]:
    return lambda built: None


class Executables:
    """Builds and keeps them, by name: ``zeros[b4]``, ``prefill[t128]``, ``insert[b4]``,
    ``decode[b4]``, ``score[t128]``, ``states[t128]``; with a cache shorter than the whole context
    ``decode[b4,s1024]``, and ``insert[b4,s4096,s1024]`` of a sequence with a shorter one."""

    def __init__(self, table: WeightTable, buckets: Buckets, on_build: OnBuild = silent):
        self.table, self.buckets, self.on_build = table, buckets, on_build
        self.built: dict[str, Built] = {}
        self._whole = [table.plan.sharding(*(None,) * ndim) for ndim in range(3)]
        self._numbers: dict[int, jax.Array] = {}
        self.one = table.plan.data  # rows of the cache a prompt is prefilled in: one per replica

    def for_requests(self, asked: Sequence[tuple[Sequence[int], int]]) -> list[str]:
        """Names of all that a run of requests will use; of each, the lengths it is prefilled at,
        and the positions of its cache."""
        chunks = {
            (context, c)
            for lengths, context in asked
            for n in lengths
            for c in self.buckets.chunk_sizes(n)
        }
        names = [self.name("prefill", c, context) for context, c in sorted(chunks)]
        batch = self.buckets.batch_for(len(asked))
        return names + self._decoding(batch, sorted({context for _, context in asked}))

    def all_names(self) -> list[str]:
        """Names of everything generation can ever use."""
        contexts = self.buckets.contexts
        names = [self.name("prefill", c, s) for s in contexts for c in self.buckets.chunks]
        for batch in self.buckets.batch:
            for n in range(len(contexts)):
                names += self._decoding(batch, contexts[: n + 1])
        return list(dict.fromkeys(names))

    def _decoding(self, batch: int, contexts: Sequence[int]) -> list[str]:
        """Names of what sequences of these contexts need once they are prefilled."""
        names = [self.name("zeros", self.one, context) for context in contexts]
        if batch == 1:  # each in its own cache
            return names + [self.name("decode", 1, context) for context in contexts]
        longest = contexts[-1]
        names.append(self.name("zeros", batch, longest))
        names += [self.name("insert", batch, longest, context) for context in contexts]
        return [*dict.fromkeys(names), self.name("decode", batch, longest)]

    def name(self, step: str, size: int, context: int, other: int | None = None) -> str:
        """Of a step for so many sequences (prefill: tokens) with caches of so many positions;
        ``other``: those of the cache that is inserted."""
        of = f"{'t' if step == 'prefill' else 'b'}{size}"
        if other not in (None, context):
            of += f",s{context},s{other}"
        elif context < self.buckets.context:
            of += f",s{context}"
        return f"{step}[{of}]"

    def parsed(self, name: str) -> tuple[str, int, list[int]]:
        """What `name` was made of: the step, its size, and the positions of one cache or two."""
        step, _, sizes = name.removesuffix("]").partition("[")
        size, *contexts = (int(one[1:]) for one in sizes.split(","))
        return step, size, contexts or [self.buckets.context]

    def build(self, names: Iterable[str]) -> None:
        """Build what is not built yet, telling ``on_build`` before and after each."""
        todo = [name for name in names if name not in self.built]
        for number, name in enumerate(todo, 1):
            done = self.on_build(name, number, len(todo))
            start, hits = time.perf_counter(), compiles.cache_hits
            compiled = self._kept(name)
            again = compiled is not None
            if compiled is None:
                compiled = self.lower(name).compile(self.options(name))
                again = compiles.cache_hits > hits
                if not again:  # what comes from jax's own cache cannot be written again
                    self._keep(name, compiled)
            self.built[name] = Built(compiled, time.perf_counter() - start, again)
            done(self.built[name])

    def __getitem__(self, name: str) -> Callable:
        """The executable; built now if nobody did before."""
        if name not in self.built:
            self.build([name])
        return self.built[name].run

    def lower(self, name: str) -> jax.stages.Lowered:
        """Trace one step for its bucket, on abstract weights."""
        step = self._step(name)
        with jax.set_mesh(self.table.plan.mesh):
            return _jit(step.run, step.donated).lower(*step.args)

    def options(self, name: str) -> dict[str, str | bool]:
        """What its compiler is told beside its defaults."""
        plan = self.table.plan
        return env.compiler_options(plan.platform, self.parsed(name)[0], plan.mesh.size)

    def _step(self, name: str) -> "_Step":
        """What an executable computes, of what."""
        kind, rows_or_tokens, (context, *others) = self.parsed(name)
        table = self.table
        plan = table.plan

        def small(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._whole[len(shape)])

        def cache(rows: int, context: int = context) -> KVCache:
            return KVCache.abstract(table.config, plan, rows, context)

        one, weights = self.one, table.abstract()
        match kind:
            case "zeros":
                shapes = cache(rows_or_tokens)
                make = lambda: jax.tree.map(  # noqa: E731
                    lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), shapes
                )
                return _Step(make, (), None, shapes)
            case "prefill":
                args = (small((one, rows_or_tokens)), *(small((one,)),) * 3)
                packed = small((one, sampling.COLUMNS))
                fn = functools.partial(step.prefill, table)
                return _Step(fn, (weights, cache(one), *args, packed), 1, (cache(one), _DRAWN))
            case "insert":
                fn = functools.partial(step.insert, table)
                held, new = cache(rows_or_tokens), cache(one, *others)
                return _Step(fn, (held, new, small((one,))), 0, held)
            case "decode":
                packed = small((rows_or_tokens, sampling.COLUMNS))
                fn = functools.partial(step.decode_many, table, DISPATCH)
                held = cache(rows_or_tokens)
                return _Step(fn, (weights, held, packed, small(())), 1, (held, _DRAWN, packed))
            case "score" | "states":
                args = (small((one, rows_or_tokens)), small((one,)), small((one,)))
                fn = functools.partial(getattr(step, kind), table)
                return _Step(fn, (weights, cache(one), *args), 1, (cache(one), 0))
        raise KeyError(name)

    def _kept(self, name: str) -> jax.stages.Compiled | None:
        """The executable as an earlier start has kept it, if one has."""
        if (folder := env.kept_executables_dir(self.table.plan.platform)) is None:
            return None
        if (content := kept.read(folder, "step", self._about(name))) is None:
            return None
        from jax.experimental.serialize_executable import deserialize_and_load

        if self.table.plan.platform == "cpu":
            native.ready()  # what it may call is there before it is loaded
        devices = self.table.plan.mesh.devices.flat
        step = self._step(name)
        trees = (jax.tree.structure((step.args, {})), jax.tree.structure(step.result))
        try:
            return deserialize_and_load(
                content, *trees, backend=devices[0].client, execution_devices=tuple(devices)
            )
        except Exception:  # whatever is wrong with it: it is made anew, and kept instead
            return None

    def _keep(self, name: str, compiled: jax.stages.Compiled) -> None:
        if (folder := env.kept_executables_dir(self.table.plan.platform)) is None:
            return
        from jax.experimental.serialize_executable import serialize

        try:
            content, *_ = serialize(compiled)
        except (ValueError, RuntimeError, NotImplementedError):  # not every backend can
            return
        kept.write(folder, "step", self._about(name), content)

    def _about(self, name: str) -> tuple[Any, ...]:
        """All that an executable depends on, beside our source."""
        plan = self.table.plan
        devices = [(d.id, d.process_index, d.device_kind) for d in plan.mesh.devices.flat]
        versions = [importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax")]
        client = plan.mesh.devices.flat[0].client
        settings = env.jax_settings(), self.options(name)
        about = (name, self.table.config, plan, self.buckets, devices, client.platform_version)
        return (*about, versions, settings, native.identity() if client.platform == "cpu" else None)

    def upload(self, x: np.ndarray) -> jax.Array:
        """A small host array on every device."""
        return jax.device_put(x, self._whole[x.ndim])

    def number(self, n: int) -> jax.Array:
        """An integer on every device; put there once."""
        if n not in self._numbers:
            self._numbers[n] = self.upload(np.asarray(n, np.int32))
        return self._numbers[n]


def _jit(fn: Callable, donated: int | None):
    return jax.jit(fn, donate_argnums=donated)


class _Step(NamedTuple):
    """A function, its abstract arguments, which of them is donated, and the tree it returns."""

    run: Callable
    args: tuple
    donated: int | None
    result: Any


_LEAF: Any = jax.ShapeDtypeStruct((), jnp.int32)
_DRAWN = Drawn(_LEAF, _LEAF, _LEAF, _LEAF)


@functools.cache
def fast_on_cpu(dtype: str) -> bool:
    """Whether XLA on this CPU multiplies ``dtype`` without widening it first; see nn/linear.py.
    It does not if jax was started before tpjax could set the flag, or if the user cleared it."""
    if dtype == "float32":
        return True
    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 256), (512, 256)))
    product = jax.jit(lambda x, w: jnp.einsum("RI,OI->RO", x, w, preferred_element_type="float32"))
    return "__ynn_fusion" in (product.lower(x, w).compile().as_text() or "")


class _Compiles:
    """How many programs XLA was asked for in this process, and how many the disk cache answered.
    After warm-up the count must not move; tests and the benchmark hold it to that."""

    def __init__(self):
        self.count = 0
        self.cache_hits = 0
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, event: str, duration_secs: float, **_) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def _event(self, event: str, **_) -> None:
        self.cache_hits += event == "/jax/compilation_cache/cache_hits"


compiles = _Compiles()
