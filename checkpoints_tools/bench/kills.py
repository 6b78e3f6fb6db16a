"""Conversions killed at random moments and resumed: every result must be the undisturbed one.

After each SIGKILL there must be no checkpoint or, if the kill came after the renaming, a whole one.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import xxhash
from tqdm import tqdm

from checkpoints_tools.staging import LOCK, partial_of
from tpjax.checkpoint.orbax import is_checkpoint


def command(src: Path, dst: Path) -> list[str]:
    words = ["convert", str(src), str(dst), "--resume", "--quiet", "--max-host-gb", "0.06"]
    return [sys.executable, "-m", "checkpoints_tools", *words]


def digests(folder: Path) -> dict[str, str]:
    """Of every file, by its name in the folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): xxhash.xxh3_128_hexdigest(path.read_bytes())
        for path in paths
    }


def begun(child: subprocess.Popen, dst: Path) -> None:
    """Wait until this process holds the work folder, or has ended."""
    while child.poll() is None:
        with suppress(OSError):
            if (partial_of(dst) / LOCK).read_text() == str(child.pid):
                return
        time.sleep(0.001)


def killed(src: Path, dst: Path, delay: float) -> None:
    """One run, killed ``delay`` seconds after it began to write, unless it has ended."""
    child = subprocess.Popen(command(src, dst), stdout=subprocess.DEVNULL)
    begun(child, dst)
    try:
        child.wait(delay)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()


def kills(src: Path, work: Path, times: int, seed: int = 0, quiet: bool = False) -> dict:
    """Kill and resume ``times`` times; raises AssertionError for a result that is another one."""
    undisturbed, dst = work / "undisturbed", work / "killed"
    child = subprocess.Popen(command(src, undisturbed), stdout=subprocess.DEVNULL)
    begun(child, undisturbed)
    start = time.perf_counter()
    while child.poll() is None and not undisturbed.exists():
        time.sleep(0.001)
    window = time.perf_counter() - start
    assert child.wait() == 0
    expected = digests(undisturbed)
    chance, before_end, resumed = random.Random(seed), 0, []
    for number in tqdm(range(times), desc="kills", disable=quiet, leave=False):
        killed(src, dst, chance.uniform(0, 1.1 * window))
        before_end += not dst.exists()
        if number % 5 == 4:  # some are killed again while they resume
            killed(src, dst, chance.uniform(0, window))
        if is_checkpoint(dst):
            assert digests(dst) == expected, "accepted as finished before it was"
        else:
            assert not dst.exists()
        done = subprocess.run([*command(src, dst), "--json"], stdout=subprocess.PIPE, check=True)
        resumed.append(json.loads(done.stdout)["converted_now"])
        assert digests(dst) == expected, "another result than the undisturbed one"
        assert not partial_of(dst).exists()
        subprocess.run(["rm", "-r", str(dst)], check=True)
    return {
        "kills": times,
        "before_the_end": before_end,
        "identical": times,
        "window_s": round(window, 2),
        "weights": len([name for name in expected if name.endswith("zarr.json")]),
        "converted_after_resume": resumed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=48)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        src = Path(folder) / "source"
        make = ["checkpoints_tools.bench.synthetic", str(src), "--small"]
        make += ["--layers", str(args.layers)]
        subprocess.run([sys.executable, "-m", *make], check=True, stdout=subprocess.DEVNULL)
        print(json.dumps(kills(src, Path(folder), args.times, args.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
