"""What a command tells its user while it works: on standard error, or not at all with --quiet."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from tpjax import env
from tpjax.engine.llm import LLM
from tpjax.engine.memory import GB
from tpjax.engine.request import RequestOutput
from tpjax.executables import Built
from tpjax.parallel.mesh import picture
from tpjax.weights import WeightSpec


class Report:
    """Loading bar, compile lines, the mesh as a picture, memory and speed."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.load_s = 0.0
        self._bar = False  # whether one is there, which a line must not break
        self.compile_s = 0.0

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def loading(self, specs: Iterable[WeightSpec]) -> Iterator[WeightSpec]:
        """Progress in bytes, weight by weight."""
        specs = list(specs)
        start = time.perf_counter()
        total = sum(spec.bytes for spec in specs)
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="loading", disable=self.quiet, leave=False
        ) as bar:
            self._bar = True
            try:
                for spec in specs:
                    yield spec
                    bar.update(spec.bytes)
            finally:
                self._bar = False
        self.load_s = time.perf_counter() - start

    def building(self, name: str, number: int, total: int) -> Callable[[Built], None]:
        """``compiling decode[b8] 2/5 ... 4.1 s, cached next time``"""
        what = f"compiling {name} {number}/{total} ..."
        whole_line = self._bar
        if not self.quiet and not whole_line:
            print(what, end="", file=sys.stderr, flush=True)

        def done(built: Built) -> None:
            self.compile_s += built.seconds
            if built.from_cache:
                source = ", from the cache"
            else:
                source = ", cached next time" if env.caches_executables() else ""
            took = f" {built.seconds:.1f} s{source}"
            if self.quiet or not whole_line:
                self.say(took)
            else:
                tqdm.write(what + took, file=sys.stderr)

        return done

    def speed(self, outputs: list[RequestOutput]) -> None:
        """Compile seconds, time to first token, tokens per second of finished requests."""
        tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
        seconds = max(o.timings.total for o in outputs)
        first = min(o.timings.time_to_first_token for o in outputs)
        self.say(
            f"compiled in {self.compile_s:.1f} s; first token after {first * 1e3:.0f} ms,"
            f" {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s"
        )

    def loaded(self, llm: LLM) -> None:
        """The mesh and what it holds, once the weights are there."""
        memory = llm.memory
        self.say(picture(llm.plan.mesh, llm.plan.heads(llm.config), llm.plan.sharing))
        self.say(
            f"per device: weights {memory.weights / GB:.3f} GB, cache {memory.cache / GB:.3f} GB of"
            f" {memory.available / GB:.1f} GB; {llm.config.family} of"
            f" {llm.table.parameters / 1e6:,.1f} M parameters in {llm.config.dtype}, loaded in"
            f" {self.load_s:.1f} s"
        )
