"""`tpjax bench start`: a process of its own from its beginning to its first token; and `bench
load`: weights onto devices, and the memory it takes.

Every round starts everything once, in turn. The first start of all has an empty cache, the others
what it left there. Files are in the page cache, as they are read once before. Beside them a process
that only asks for as much memory as the files have.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tpjax import env
from tpjax.checkpoint.files import weight_files
from tpjax.checkpoint.folder import bundled, choose_dtype, locate, read_folder
from tpjax.config import check_dtype
from tpjax.devices import check_sizes
from tpjax.errors import RunError, UsageError

PROMPT = "Once upon a time"
PEERS = {"hf": "tpjax.bench.peers.hf_start"}
_PIECE = 1 << 24  # bytes read at once


class Started(NamedTuple):
    """Seconds from a process's start to its first word, and the most memory it had, in bytes."""

    seconds: float
    peak: int


def bench_start(args: argparse.Namespace) -> int:
    """Measure starts and print one JSON object."""
    folder = _checked(args)
    _resolve_dtype(args, folder)
    names = list(dict.fromkeys(name for given in args.compare for name in given.split(",")))
    if unknown := [name for name in names if name not in PEERS]:
        raise UsageError(f"--compare {unknown[0]}: known are {', '.join(PEERS)}")
    words = ["generate", "--model", str(folder), *_words(args)]
    words += ["--prompt", PROMPT, "--max-tokens", "1", "--stream", "--quiet"]
    commands = {"tpjax": ["-m", "tpjax.cli", *words]}
    for name in names:
        commands[name] = ["-m", PEERS[name], "--model", str(folder), "--prompt", PROMPT]
        commands[name] += ["--dtype", args.dtype]
    starts: dict[str, list[Started]] = {name: [] for name in commands}
    read_files(folder)
    with tempfile.TemporaryDirectory(prefix="tpjax-start-") as cache:
        environment = env.with_cache(Path(cache))
        first = started(commands["tpjax"], environment)
        size, memory = sum(file.stat().st_size for file in weight_files(folder)), []
        for _ in range(args.rounds):
            for name, command in commands.items():
                starts[name].append(started(command, environment))
            memory.append(_new_memory(size))
    ours = [s.seconds for s in starts["tpjax"]]
    result = {
        "model": str(folder),
        "dtype": args.dtype,
        "rounds": args.rounds,
        "files_bytes": size,
        "first_start_s": round(first.seconds, 2),
        "start_s": round(statistics.median(ours), 2),
        "start_s_spread": [round(s, 2) for s in (min(ours), max(ours))],
        "new_memory_s": round(statistics.median(memory), 2),
        "peak_bytes": max(s.peak for s in starts["tpjax"]),
        "peers": {name: _beside(starts[name], ours) for name in names},
    }
    return _print(args, result)


def bench_load(args: argparse.Namespace) -> int:
    """Measure loading onto CPU devices and print one JSON object."""
    folder = _checked(args)
    command = ["-m", "tpjax.bench.load_memory", "--model", str(folder)]
    command += ["-tp", str(args.tensor_parallel_size or 1)]
    command += ["--dtype", "float32" if args.dtype == "auto" else args.dtype]
    size = read_files(folder)
    loads, reads = [], []
    for _ in range(args.rounds):
        start = time.perf_counter()
        read_files(folder)
        reads.append(size / (time.perf_counter() - start))
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"loading failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        loads.append(json.loads(done.stdout))
    seconds = [load["load_s"] for load in loads]
    rates = [size / s for s in seconds]  # of the files' bytes, as the reading's
    shares = [rate / read for rate, read in zip(rates, reads, strict=True)]
    result = {
        "model": str(folder),
        "rounds": args.rounds,
        **{word: loads[0][word] for word in ("tensor", "dtype", "weights_bytes")},
        "files_bytes": size,
        "load_s": round(statistics.median(seconds), 2),
        "load_s_spread": [round(s, 2) for s in (min(seconds), max(seconds))],
        "GB_per_s": round(statistics.median(rates) / 1e9, 2),
        "read_GB_per_s": round(statistics.median(reads) / 1e9, 2),
        "of_reading": round(statistics.median(shares), 2),
        "beyond_weights_bytes": max(load["beyond_weights_bytes"] for load in loads),
    }
    return _print(args, result)


def started(command: Sequence[str], environment: dict[str, str]) -> Started:
    """Run a module until it has said something, and to its end. Raises RunError if it fails."""
    with tempfile.TemporaryFile() as told:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=told, env=environment
        )
        assert process.stdout is not None
        with process.stdout as said_by_it:
            word = said_by_it.read(1)
            seconds = time.perf_counter() - start
            said_by_it.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not word:
            told.seek(0)
            said = told.read().decode(errors="replace").strip().splitlines() or ["nothing"]
            raise RunError(f"{' '.join(command[:2])} ended without a token; it said: {said[-1]}")
    return Started(seconds, usage.ru_maxrss * 1024)


def _new_memory(size: int) -> float:
    """Seconds until a process of its own has so many bytes of memory."""
    command = [sys.executable, "-m", "tpjax.bench.new_memory", str(size)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def read_files(folder: Path) -> int:
    """Read all weights' files once into one buffer; how many bytes that is."""
    buffer, total = memoryview(bytearray(_PIECE)), 0
    for file in weight_files(folder):
        with open(file, "rb", buffering=0) as opened:
            while got := opened.readinto(buffer):
                total += got
    return total


def _resolve_dtype(args: argparse.Namespace, folder: Path) -> None:
    """What "auto" means here, so that all systems have the same."""
    stored = read_folder(folder).stored_dtype
    args.dtype = choose_dtype(args.dtype, stored, "gpu" if env.has_accelerator() else "cpu")


def _checked(args: argparse.Namespace) -> Path:
    if args.rounds < 5:
        raise UsageError(f"--rounds {args.rounds}: a median needs at least 5")
    check_dtype(args.dtype)
    check_sizes(args)
    return locate(args.model or bundled())


def _words(args: argparse.Namespace) -> list[str]:
    given = {
        "--tensor-parallel-size": args.tensor_parallel_size,
        "--data-parallel-size": args.data_parallel_size,
        "--expert-parallel-size": args.expert_parallel_size,
        "--devices": args.devices,
        "--dtype": args.dtype,
    }
    return [str(w) for word, value in given.items() if value is not None for w in (word, value)]


def _beside(theirs: list[Started], ours: list[float]) -> dict:
    seconds = [s.seconds for s in theirs]
    ratios = sorted(a / b for a, b in zip(seconds, ours, strict=True))
    return {
        "start_s": round(statistics.median(seconds), 2),
        "ratio": [round(r, 2) for r in (ratios[0], statistics.median(ratios), ratios[-1])],
        "peak_bytes": max(s.peak for s in theirs),
    }


def _print(args: argparse.Namespace, result: dict) -> int:
    from tpjax.bench import record

    env.start(1 if args.kind == "load" else None)
    result |= record.provenance()
    print(json.dumps(result, indent=None if args.json else 2), flush=True)
    return 0
