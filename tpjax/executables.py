"""Executables: one per bucket, built ahead of time, counted.

The set is finite and known from `Buckets` before the first request.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tpjax import sampling, step
from tpjax.buckets import DISPATCH, Buckets
from tpjax.cache import KVCache
from tpjax.weights import WeightTable


@dataclass(frozen=True)
class Built:
    """One executable and what it took to build."""

    run: jax.stages.Compiled
    seconds: float
    from_cache: bool


OnBuild = Callable[[str, int, int], Callable[[Built], None]]


def silent(name: str, number: int, total: int) -> Callable[[Built], None]:
    return lambda built: None


class Executables:
    """Builds and keeps them, by name: ``zeros[b4]``, ``prefill[t128]``, ``insert[b4]``,
    ``decode[b4]``, ``score[t128]``, ``states[t128]``."""

    def __init__(self, table: WeightTable, buckets: Buckets, on_build: OnBuild = silent):
        self.table, self.buckets, self.on_build = table, buckets, on_build
        self.built: dict[str, Built] = {}
        self.one = table.plan.data  # rows of the cache a prompt is prefilled in: one per replica

    def for_requests(self, lengths: Sequence[Sequence[int]]) -> list[str]:
        """Names of all that a run of requests will use; of each, the lengths it is prefilled at."""
        batch = self.buckets.batch_for(len(lengths))
        chunks = {c for each in lengths for n in each for c in self.buckets.chunk_sizes(n)}
        names = [f"prefill[t{c}]" for c in sorted(chunks)]
        return names + self._decoding(batch)

    def all_names(self) -> list[str]:
        """Names of everything generation can ever use."""
        names = [f"prefill[t{c}]" for c in self.buckets.chunks]
        for batch in self.buckets.batch:
            names += [n for n in self._decoding(batch) if n not in names]
        return names

    def _decoding(self, batch: int) -> list[str]:
        zeros = [f"zeros[b{self.one}]"]
        if batch == 1:
            return [*zeros, "decode[b1]"]
        if batch != self.one:
            zeros.append(f"zeros[b{batch}]")
        return [*zeros, f"insert[b{batch}]", f"decode[b{batch}]"]

    def build(self, names: Iterable[str]) -> None:
        """Build what is not built yet, telling ``on_build`` before and after each."""
        todo = [name for name in names if name not in self.built]
        for number, name in enumerate(todo, 1):
            done = self.on_build(name, number, len(todo))
            start, hits = time.perf_counter(), compiles.cache_hits
            compiled = self.lower(name).compile()
            seconds = time.perf_counter() - start
            self.built[name] = Built(compiled, seconds, compiles.cache_hits > hits)
            done(self.built[name])

    def __getitem__(self, name: str) -> Callable:
        """The executable; built now if nobody did before."""
        if name not in self.built:
            self.build([name])
        return self.built[name].run

    def lower(self, name: str) -> jax.stages.Lowered:
        """Trace one step for its bucket, on abstract weights."""
        kind, _, size = name.removesuffix("]").partition("[")
        rows_or_tokens = int(size[1:])
        table = self.table
        plan = table.plan

        def small(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            sharding = plan.sharding(*(None,) * len(shape))
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

        def cache(rows: int) -> KVCache:
            return KVCache.abstract(table.config, plan, rows, self.buckets.context)

        one, weights = self.one, table.abstract()
        with jax.set_mesh(plan.mesh):
            match kind:
                case "zeros":
                    shapes = cache(rows_or_tokens)
                    make = lambda: jax.tree.map(  # noqa: E731
                        lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), shapes
                    )
                    return jax.jit(make).lower()
                case "prefill":
                    args = (small((one, rows_or_tokens)), *(small((one,)),) * 3)
                    packed = small((one, sampling.COLUMNS))
                    fn = functools.partial(step.prefill, table)
                    return _jit(fn, 1).lower(weights, cache(one), *args, packed)
                case "insert":
                    fn = functools.partial(step.insert, table)
                    return _jit(fn, 0).lower(cache(rows_or_tokens), cache(one), small((one,)))
                case "decode":
                    packed = small((rows_or_tokens, sampling.COLUMNS))
                    fn = functools.partial(step.decode_many, table, DISPATCH)
                    return _jit(fn, 1).lower(weights, cache(rows_or_tokens), packed, small(()))
                case "score" | "states":
                    args = (small((one, rows_or_tokens)), small((one,)), small((one,)))
                    fn = functools.partial(getattr(step, kind), table)
                    return _jit(fn, 1).lower(weights, cache(one), *args)
        raise KeyError(name)

    def upload(self, x: np.ndarray) -> jax.Array:
        """A small host array on every device."""
        return jax.device_put(x, self.table.plan.sharding(*(None,) * x.ndim))


@functools.cache
def fast_on_cpu(dtype: str) -> bool:
    """Whether XLA on this CPU multiplies ``dtype`` without widening it first; see nn/linear.py.
    It does not if jax was started before tpjax could set the flag, or if the user cleared it."""
    if dtype == "float32":
        return True
    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 256), (512, 256)))
    product = jax.jit(lambda x, w: jnp.einsum("RI,OI->RO", x, w, preferred_element_type="float32"))
    return "__ynn_fusion" in (product.lower(x, w).compile().as_text() or "")


def _jit(fn, donated: int):
    return jax.jit(fn, donate_argnums=donated)


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
