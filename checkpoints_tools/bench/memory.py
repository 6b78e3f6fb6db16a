"""The memory a conversion takes: anonymous memory at its peak, and a run under a hard limit.

The page cache of files read and written is the kernel's to take back, so it is not counted; the
hard limit of a control group, where this user may make one, counts it and shows that.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def anonymous(pid: int) -> int:
    """RssAnon of a process, 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else 0


def run(words: list[str], group: Path | None = None) -> dict:
    """Run the command, in a control group if there is one: its peak, seconds (by the clock, and of
    processors) and exit code."""

    def enter() -> None:
        assert group is not None
        (group / "cgroup.procs").write_text(str(os.getpid()))

    start, busy, peak = time.perf_counter(), processors(), 0
    with tempfile.TemporaryFile("w+") as said:  # a pipe nobody reads would fill up
        child = subprocess.Popen(
            [sys.executable, "-m", "checkpoints_tools", *words],
            stdout=said,
            preexec_fn=enter if group else None,
        )
        while child.poll() is None:
            peak = max(peak, anonymous(child.pid))
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        said.seek(0)
        return {
            "peak": peak,
            "seconds": round(seconds, 1),
            "processor_seconds": round(processors() - busy, 1),
            "exit": child.returncode,
            "said": said.read(),
        }


def processors() -> float:
    """Seconds that processors worked for the children this process has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def limited(limit: int) -> Path | None:
    """A new control group with a hard limit of memory, or None where there can be none."""
    for parent, word in (
        (_GROUPS / "memory", "memory.limit_in_bytes"),  # version 1
        (_GROUPS, "memory.max"),  # version 2
    ):
        group = parent / f"tpjax-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / word).write_text(str(limit))
            return group
        except OSError:
            group.rmdir()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--layers", type=int, default=14, help="14: 8.2 GB, the largest weight 1.05"
    )
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--max-host-gb", type=float, default=0.25)
    parser.add_argument("--hard-limit-mb", type=int, default=450, help="page cache included")
    parser.add_argument("--dtype", help="cast to it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        src, dst = Path(folder) / "source", Path(folder) / "converted"
        # In another process: this one forks, which jax's threads do not survive.
        make = ["checkpoints_tools.bench.synthetic", str(src)]
        make += ["--layers", str(args.layers), "--shards", str(args.shards)]
        subprocess.run([sys.executable, "-m", *make], check=True, stdout=subprocess.DEVNULL)
        total = sum(path.stat().st_size for path in src.glob("*.safetensors"))
        words = ["convert", str(src), str(dst), "--max-host-gb", str(args.max_host_gb)]
        words += [
            "--json",
            "--quiet",
            "--overwrite",
            *(["--dtype", args.dtype] if args.dtype else []),
        ]
        free = run(words)
        result = {
            "bytes": total,
            "shards": len(list(src.glob("*.safetensors"))),
            "exit": free["exit"],
            "peak_anonymous_bytes": free["peak"],
            "buffers_bytes": json.loads(free["said"])["buffers_bytes"],
            "seconds": free["seconds"],
        }
        group = limited(args.hard_limit_mb << 20)
        result["hard_limit_bytes"] = None
        if group is not None:
            held = run(words, group)
            group.rmdir()
            result["hard_limit_bytes"] = args.hard_limit_mb << 20
            result["hard_limit_exit"], result["hard_limit_seconds"] = held["exit"], held["seconds"]
        verified = run(["verify", str(dst), "--against", str(src), "--json", "--quiet"])
        result["verify_exit"] = verified["exit"]
        result["verify_peak_anonymous_bytes"] = verified["peak"]
        orbax = [sys.executable, "-m", "checkpoints_tools.bench.orbax_restore", str(dst)]
        result["orbax_restores_exit"] = subprocess.run(orbax, stdout=subprocess.DEVNULL).returncode
    print(json.dumps(result))
    limit = 450e6 + args.max_host_gb * 1e9
    exits = [code for word, code in result.items() if word.endswith("exit")]
    return int(result["peak_anonymous_bytes"] > limit or any(exits))


if __name__ == "__main__":
    sys.exit(main())
