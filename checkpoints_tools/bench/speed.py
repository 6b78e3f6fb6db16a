"""Converting beside ``cp`` of the same bytes, and restoring beside reading the same bytes.

Rounds in alternation, in one run, on one disk. ``cp`` is timed as it is and with the ``sync`` that
makes its copy last, which converting always includes. Reading is into fresh memory, which a restore
needs too, by one thread and by as many as a restore has. On a virtual machine memory that was just
given back is several times faster to get than memory that has been idle; so there is a pause before
each, and each round begins with another one.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from checkpoints_tools.bench import orbax_restore, synthetic
from tpjax import env

_THREADS = 4  # of a restore
_PIECE = 64 << 20
PAUSE = 2.0  # seconds


def timed(bytes_: int, run: Callable[[], object]) -> float:
    """GB/s."""
    start = time.perf_counter()
    run()
    return bytes_ / (time.perf_counter() - start) / 1e9


def copy(src: Path, dst: Path) -> None:
    subprocess.run(["cp", "-r", str(src), str(dst)], check=True)


def copy_and_sync(src: Path, dst: Path) -> None:
    copy(src, dst)
    subprocess.run(["sync", *(str(path) for path in dst.iterdir())], check=True)


def convert(src: Path, dst: Path, gb: float) -> float:
    """In a process of its own, as a user would. Returns its own seconds, without Python's start."""
    words = ["convert", str(src), str(dst), "--max-host-gb", str(gb), "--quiet", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "checkpoints_tools", *words],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return json.loads(done.stdout)["seconds"]


def read(folder: Path, threads: int) -> list[np.ndarray]:
    """Every byte of the folder in memory."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    held = [np.empty(path.stat().st_size, np.uint8) for path in paths]
    pieces = [
        (path, buffer, at)
        for path, buffer in zip(paths, held, strict=True)
        for at in range(0, len(buffer), _PIECE)
    ]

    def one(piece) -> None:
        path, buffer, at = piece
        with open(path, "rb", buffering=0) as file:
            file.seek(at)
            end = min(at + _PIECE, len(buffer))
            while at < end:
                at += file.readinto(buffer[at:end])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, pieces))
    return held


def tables(folder: Path, tensor: int):
    """The weights' table in the stored dtype, and their family."""
    from tpjax.checkpoint import folder as folders
    from tpjax.parallel.mesh import make_mesh
    from tpjax.plan import Plan
    from tpjax.weights import WeightTable

    model = folders.read_folder(folder)
    config = folders.with_dtype(model.config, model.stored_dtype)
    return WeightTable(config, Plan(mesh=make_mesh(tensor=tensor)).fit(config)), model.family


def restore(folder: Path, tensor: int, verify=None):
    """Every weight on its devices, in the stored dtype."""
    from tpjax.checkpoint import load

    table, family = tables(folder, tensor)
    return load.load(table, family, load.open_source(folder, verify))


def tensorstore_write(src: Path, dst: Path) -> None:
    """The same arrays written by TensorStore, four slabs of rows at a time, each a shard; without
    digests, without looking at the values, without a sync."""
    import tensorstore

    from checkpoints_tools.plan import plan
    from tpjax.checkpoint.layout import NUMPY

    conversion = plan(src)
    context = tensorstore.Context({"file_io_sync": False})
    pending: list = []
    for item in conversion.items:
        layout = item.layout
        about = json.loads(layout.zarr_json)
        rows = max(layout.chunk_shape[0], (8 << 20) // layout.row_bytes)
        rows = min(layout.rows, rows // layout.chunk_shape[0] * layout.chunk_shape[0])
        if layout.axis == 1:
            rows = min(layout.rows, max(1, (8 << 20) // layout.row_bytes))
        sharding = about["codecs"][0]["configuration"]
        sharding["chunk_shape"][0] = min(sharding["chunk_shape"][0], rows)
        about["chunk_grid"]["configuration"]["chunk_shape"][0] = rows
        kept = ("shape", "data_type", "fill_value", "chunk_grid", "codecs")
        store = tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{dst / item.path}/"},
                "metadata": {word: about[word] for word in kept},
                "create": True,
            },
            context=context,
        ).result()
        with conversion.source.rows(item.name) as read:
            for first in range(0, layout.rows, rows):
                slab = np.empty((min(rows, layout.rows - first), layout.row_bytes), np.uint8)
                read(first, slab)
                values = slab.view(NUMPY[layout.dtype]).reshape(-1, *layout.shape[1:])
                end = first + len(slab)
                pending.append(
                    store[first:end].write(values, can_reference_source_data_indefinitely=True)
                )
                if len(pending) == 4:
                    pending.pop(0).result()
    for write in pending:
        write.result()


def rotated(ways: dict, number: int) -> list:
    """The ways, beginning with another one in each round."""
    items = list(ways.items())
    return items[number % len(items) :] + items[: number % len(items)]


def writing(src: Path, work: Path, rounds: int, gb: float) -> dict[str, list[float]]:
    total = sum(path.stat().st_size for path in src.iterdir())
    ways = {
        "cp": lambda dst: copy(src, dst),
        "cp and sync": lambda dst: copy_and_sync(src, dst),
        "convert": lambda dst: convert(src, dst, gb),
        "TensorStore": lambda dst: tensorstore_write(src, dst),
    }
    own = "convert, without its start"
    out: dict[str, list[float]] = {name: [] for name in (*ways, own)}
    for number in range(rounds):
        for name, way in rotated(ways, number):
            dst = work / "written"
            time.sleep(PAUSE)
            start = time.perf_counter()
            seconds = way(dst)
            out[name].append(total / (time.perf_counter() - start) / 1e9)
            if seconds is not None:
                out[own].append(total / seconds / 1e9)
            shutil.rmtree(dst)
            os.sync()
    return out


def reading(src: Path, work: Path, rounds: int, gb: float) -> dict[str, list[float]]:
    done = work / "converted"
    convert(src, done, gb)
    total = sum(path.stat().st_size for path in src.iterdir())
    ways: dict[str, Callable[[], object]] = {
        "read, 1 thread": lambda: read(done, 1),
        f"read, {_THREADS} threads": lambda: read(done, _THREADS),
    }
    for tensor in (1, 4):
        ways[f"restore safetensors, tensor={tensor}"] = lambda n=tensor: restore(src, n)
        ways[f"restore, tensor={tensor}"] = lambda n=tensor: restore(done, n)
        ways[f"restore verify=full, tensor={tensor}"] = lambda n=tensor: restore(done, n, "full")
        ways[f"Orbax's restore, tensor={tensor}"] = lambda n=tensor: orbax_restore.restore(done, n)
    out: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in rotated(ways, number):
            time.sleep(PAUSE)
            rate = timed(total, way)
            if number:  # the first round fills the page cache
                out[name].append(rate)
    return out


def table(title: str, results: dict[str, list[float]], base: str) -> list[str]:
    """Medians with their spread, and ratios round by round."""
    lines = [f"| {title} | GB/s (spread) | ratio to {base} |", "|---|---|---|"]
    for name, rates in results.items():
        ratios = [a / b for a, b in zip(rates, results[base], strict=True)]
        lines.append(
            f"| {name} | {statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})"
            f" | {statistics.median(ratios):.2f} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=2, help="0.44 GB each, and 2.1 GB")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-host-gb", type=float, default=0.25)
    parser.add_argument("--only", choices=("writing", "reading"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    env.start(devices=8)
    with tempfile.TemporaryDirectory() as folder:
        src, work = Path(folder) / "source", Path(folder)
        synthetic.write(src, args.layers, 8)
        results = {}
        if args.only != "reading":
            results["writing"] = writing(src, work, args.rounds, args.max_host_gb)
        if args.only != "writing":
            results["reading"] = reading(src, work, args.rounds, args.max_host_gb)
    if args.json:
        print(json.dumps(results))
        return 0
    for title, base in (("writing", "cp"), ("reading", f"read, {_THREADS} threads")):
        if title in results:
            print("\n".join(table(title, results[title], base)), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
