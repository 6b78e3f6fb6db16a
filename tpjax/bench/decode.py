"""`tpjax bench decode` and `bench prefill`: loading, compiling, prefill and greedy decode of one
batch, as JSON.

Prefill is the time until every sequence has its first token, decode what follows; every figure is a
median over rounds, with its spread. Nothing compiles while it is measured. ``ms_per_token`` and
``bytes_per_token`` are those of one step, which makes a token for every sequence of the batch;
``load_s`` is null where weights are random; the disk cache of executables is off. ``--compare``
measures other systems in the same rounds, one after the other and each first in its turn, so that
a machine that is slow for a minute is slow for all. ``--sweep`` measures single steps instead
(`sweep`).
"""

import argparse
import contextlib
import functools
import json
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tpjax import env, picture
from tpjax.bench import sweep
from tpjax.bench.peers import PEERS, Peer
from tpjax.config import check_dtype
from tpjax.devices import start_devices
from tpjax.errors import RunError, UsageError

if TYPE_CHECKING:
    from tpjax.engine.llm import LLM
    from tpjax.report import Report

HOST_TOKENS = 16  # of a run in which the host's own time is measured


def bench_prefill(args: argparse.Namespace) -> int:
    """`bench_decode` of prompts alone."""
    args.max_tokens, args.sweep, args.plot = 0, None, None
    return bench_decode(args)


def bench_decode(args: argparse.Namespace) -> int:
    """Measure and print one JSON object; append a row to a file with ``--record``."""
    for name, least in (("batch", 1), ("prompt_length", 1), ("max_tokens", args.kind == "decode")):
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if args.rounds < 5:
        raise UsageError(f"--rounds {args.rounds}: a median needs at least 5")
    check_dtype(args.dtype)
    compared(args)
    wanted = sweep.points(args) if args.sweep else []
    if args.plot and not args.sweep:
        raise UsageError("--plot draws a sweep: give --sweep too")
    if args.sweep and (args.compare or args.record):
        raise UsageError("--sweep measures tpjax alone, and is no row of a table")
    if args.plot:
        picture.check(Path(args.plot))
    if wanted and args.tensor_parallel_size is None:
        args.tensor_parallel_size = wanted[-1].tensor
    start_devices(args)
    env.without_executable_cache()
    from tpjax.bench import record

    result = (measure_sweep(args, wanted) if wanted else measure(args)) | record.provenance()
    if args.plot:
        sweep.plot(Path(args.plot), result)
    print(json.dumps(result, indent=None if args.json else 2), flush=True)
    if args.record:
        record.append(Path(args.record), result)
    return 0


def measure(args: argparse.Namespace) -> dict:
    """Load, build, and time the batch `args.rounds` times."""
    import numpy as np

    from tpjax.bench.bandwidth import read_bandwidth
    from tpjax.executables import compiles
    from tpjax.report import Report

    report = Report(args.quiet)
    positions = args.prompt_length + args.max_tokens + 1
    llm = _model(args, report, args.tensor_parallel_size, args.batch, positions)
    report.loaded(llm)
    rng = np.random.default_rng(0)
    shape = (args.batch, args.prompt_length)
    prompts = rng.integers(0, llm.config.vocab, shape).tolist()
    timed(llm, prompts, args.max_tokens)
    before = compiles.count
    bandwidth: list[float] = []
    ours: list[tuple[float, float]] = []
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(peer) for peer in _peers(args, llm)]
        rounds: dict[Peer, list[tuple[float, float]]] = {peer: [] for peer in peers}
        turns: list[Callable[[], None]] = [
            lambda: bandwidth.append(read_bandwidth(llm.plan.platform)),
            lambda: ours.append(timed(llm, prompts, args.max_tokens)),
            *(functools.partial(_one_round, *of) for of in rounds.items()),
        ]
        for n in range(args.rounds):
            # Everybody begins once: who comes after one that reads much memory finds less of it.
            for turn in turns[n % len(turns) :] + turns[: n % len(turns)]:
                turn()
    first, decode = (list(column) for column in zip(*ours, strict=True))
    if compiles.count != before:
        raise RunError(f"{compiles.count - before} compiles happened while measuring")
    limits = [one * (1 if llm.plan.platform == "cpu" else _devices(llm)) for one in bandwidth]
    compile_s = round(report.compile_s, 3)
    decoded = _decoded(args, llm, decode, limits, prompts[0]) if args.max_tokens else {}
    tokens = args.batch * args.prompt_length
    return {
        "kind": args.kind,
        "model": str(args.config or args.model or "bundled"),
        "parameters": llm.table.parameters,
        "mesh": dict(llm.plan.mesh.shape),
        "platform": llm.plan.platform,
        "dtype": llm.config.dtype,
        "batch": args.batch,
        "prompt_length": args.prompt_length,
        "max_tokens": args.max_tokens,
        "rounds": args.rounds,
        "load_s": None if args.config else round(report.load_s, 3),
        "compile_s": compile_s,
        "prefill_tok_s": round(tokens / statistics.median(first), 2),
        "prefill_tok_s_spread": [round(tokens / t, 2) for t in (max(first), min(first))],
        **decoded,
        "read_bandwidth": round(max(limits)),
        "peers": {
            peer.name: _beside(peer, seconds, first, decode, args)
            for peer, seconds in rounds.items()
        },
    }


def _one_round(peer: Peer, seconds: list[tuple[float, float]]) -> None:
    seconds.append(peer.round())


def timed(llm: "LLM", prompts: list[list[int]], more: int) -> tuple[float, float]:
    """Seconds until every prompt has its first token, and of ``more`` tokens for each after it."""
    from tpjax.params import SamplingParams

    waiting, at = len(prompts), 0.0

    def look(request) -> None:
        nonlocal waiting, at
        if len(request.token_ids) == 1:
            waiting -= 1
            at = at if waiting else time.perf_counter()

    params = SamplingParams(temperature=0.0, max_tokens=more + 1, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params, on_progress=look)
    return at - start, time.perf_counter() - at


def host_ms(llm: "LLM", prompt: list[int]) -> dict:
    """Milliseconds a token between the end of one decode and the call of the next, of one sequence
    whose tokens are read one by one (``each``), and of one whose tokens one dispatch makes
    (``many``). A thread that waits for results tells when they were there."""
    from tpjax.params import SamplingParams

    most = min(HOST_TOKENS, llm.max_model_len - len(prompt))
    params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True)
    llm._build_for(llm._requests([prompt], params))
    found = {}
    for name, tokens in (("each", 1), ("many", None)):
        idle = []
        for _ in range(5):
            with Watched(llm) as watched:
                for _ in llm._engine.run(llm._requests([prompt], params), tokens=tokens):
                    pass
            idle.append(watched.idle() / most)
        found[name] = round(statistics.median(idle) * 1e3, 4)
    return found


class Watched:
    """When decode was called and when its tokens were there, in seconds."""

    def __init__(self, llm: "LLM"):
        self.built, self.calls, self.ends = llm.executables.built, [], []
        self._kept = dict(self.built)
        self._results: queue.SimpleQueue = queue.SimpleQueue()

    def __enter__(self) -> "Watched":
        for name, one in self._kept.items():
            if name.startswith("decode"):
                self.built[name] = replace(one, run=functools.partial(self._call, one.run))
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.built.update(self._kept)
        self._results.put(None)
        self._thread.join()

    def _call(self, run: Callable, *args):
        self.calls.append(time.perf_counter())
        result = run(*args)
        self._results.put(result[1])
        return result

    def _wait(self) -> None:
        import jax

        while (drawn := self._results.get()) is not None:
            jax.block_until_ready(drawn)
            self.ends.append(time.perf_counter())

    def idle(self) -> float:
        """Seconds in which nothing had been called for that was not there."""
        pairs = zip(self.ends, self.calls[1:], strict=False)
        return sum(max(0.0, call - end) for end, call in pairs)


def read_share(read: int, seconds: list[float], limits: list[float]) -> float:
    """Median share of the bandwidth, bytes per second, that was probed in the same round: the
    memory's pace changes from one to the next. ``read``: bytes in ``seconds``."""
    return statistics.median(read / s / limit for s, limit in zip(seconds, limits, strict=True))


def _decoded(
    args: argparse.Namespace,
    llm: "LLM",
    decode: list[float],
    limits: list[float],
    prompt: list[int],
) -> dict:
    buckets = llm.executables.buckets
    step_bytes = bytes_per_step(llm, buckets.batch[-1], buckets.context)
    per_token = statistics.median(decode) / args.max_tokens
    tokens = args.batch * args.max_tokens
    return {
        "decode_tok_s": round(tokens / statistics.median(decode), 2),
        "decode_tok_s_spread": [round(tokens / t, 2) for t in (max(decode), min(decode))],
        "ms_per_token": round(per_token * 1e3, 3),
        "bytes_per_token": step_bytes,
        "read_bandwidth_share": round(read_share(step_bytes * args.max_tokens, decode, limits), 3),
        "host_ms": host_ms(llm, prompt),
    }


def compared(args: argparse.Namespace) -> list[str]:
    """The peers that are asked for. Raises UsageError for one that is not known."""
    names = [name for given in args.compare for name in given.split(",")]
    for name in names:
        if name not in PEERS:
            raise UsageError(f"--compare {name}: known are {', '.join(PEERS)}")
    return list(dict.fromkeys(names))


def _model(
    args: argparse.Namespace, report: "Report", tensor: int | None, batch: int, positions: int
) -> "LLM":
    from tpjax.checkpoint.folder import bundled
    from tpjax.engine.llm import LLM

    return LLM(
        args.config or args.model or bundled(),
        tensor_parallel_size=tensor or "auto",
        data_parallel_size=args.data_parallel_size,
        expert_parallel_size=args.expert_parallel_size,
        dtype=args.dtype,
        max_model_len=positions,
        max_num_seqs=batch,
        random_weights=args.config is not None,
        progress=report.loading,
        on_build=report.building,
        say=report.say,
    )


def measure_sweep(args: argparse.Namespace, wanted: list[sweep.Point]) -> dict:
    """The steps of a sweep, and the bandwidth probed before and after."""
    import jax

    from tpjax.bench.bandwidth import read_bandwidth
    from tpjax.cache import KVCache
    from tpjax.report import Report

    report, models = Report(args.quiet), {}
    most, longest = max(p.batch for p in wanted), max(p.context for p in wanted)

    def make(tensor: int):
        models[tensor] = _model(args, report, tensor, most, longest)
        return models[tensor]

    def bytes_at(point: sweep.Point) -> tuple[int, int]:
        llm = models[point.tensor]
        cache = KVCache.bytes_per_device(llm.config, llm.plan, point.batch, point.context)
        held = llm.table.bytes_per_device + cache
        return bytes_per_step(llm, point.batch, point.context), held

    bandwidth = [read_bandwidth(jax.default_backend())]
    measured = sweep.measure(wanted, args.rounds, make)
    llm = next(iter(models.values()))
    bandwidth.append(read_bandwidth(jax.default_backend()))
    return {
        "model": str(args.config or args.model or "bundled"),
        "parameters": llm.table.parameters,
        "platform": llm.plan.platform,
        "dtype": llm.config.dtype,
        "rounds": args.rounds,
        "read_bandwidth": round(max(bandwidth)),
        "sweep": sweep.report(measured, bytes_at),
    }


def _peers(args: argparse.Namespace, llm) -> Iterator[Peer]:
    from tpjax.checkpoint.folder import bundled

    words = ["--config", args.config] if args.config else ["--model", args.model or str(bundled())]
    words += ["--dtype", llm.config.dtype, "--batch", args.batch]
    words += ["--prompt-length", args.prompt_length, "--max-tokens", args.max_tokens]
    for name in compared(args):
        yield Peer(name, list(map(str, words)), llm.plan.tensor_degree)


def _beside(peer: Peer, seconds, first: list[float], decode: list[float], args) -> dict:
    """A peer's rates, and how many times as fast tpjax was, round by round: least, median, most."""

    def ratio(theirs: list[float], ours: list[float]) -> list[float]:
        each = sorted(a / b for a, b in zip(theirs, ours, strict=True))
        return [round(n, 3) for n in (each[0], statistics.median(each), each[-1])]

    one, rest = (list(column) for column in zip(*seconds, strict=True))
    beside = {
        "about": peer.about,
        "prefill_tok_s": round(args.batch * args.prompt_length / statistics.median(one), 2),
        "prefill_ratio": ratio(one, first),
    }
    if args.max_tokens:
        rate = args.batch * args.max_tokens / statistics.median(rest)
        beside |= {"decode_tok_s": round(rate, 2), "decode_ratio": ratio(rest, decode)}
    return beside


def bytes_per_step(llm: "LLM", batch: int, positions: int) -> int:
    """What one decode step of B sequences reads, on all devices together: every weight once per
    replica (of an untied embedding only a few rows; of E experts those that B sequences choose with
    k each, E (1 - (1 - k / E)^B) on average) and their positions of the cache."""
    from tpjax.cache import KVCache

    table, plan, moe = llm.table, llm.plan, llm.config.moe
    unread = 0 if llm.config.tie_embeddings else table.by_path["embed.w"].bytes_per_device
    if moe is not None:
        experts = sum(s.bytes_per_device for s in table.specs if s.dims[0].axis == "experts")
        unread += int(experts * (1 - moe.per_token / moe.experts) ** batch)
    weights = (table.bytes_per_device - unread) * _devices(llm)
    return weights + KVCache.bytes_per_device(llm.config, plan, batch, positions) * _devices(llm)


def _devices(llm) -> int:
    return llm.plan.mesh.devices.size
