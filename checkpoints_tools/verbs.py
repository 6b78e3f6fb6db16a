"""The verbs as commands: devices, progress on standard error, results on standard output."""

import argparse
import json
import time
from contextlib import contextmanager

from tqdm import tqdm

from tpjax import env
from tpjax.devices import MOST
from tpjax.errors import UsageError


def convert_verb(args: argparse.Namespace) -> int:
    mesh = {"data": args.data, "tensor": args.tensor, "rep": args.rep}
    devices = args.data * args.tensor * args.rep
    if min(mesh.values()) < 1 or devices > MOST:
        raise UsageError(f"--data x --tensor x --rep = {devices}: from 1 to {MOST} devices")
    limit = args.max_host_gb
    if not 0 < limit < 1e6:
        raise UsageError(f"--max-host-gb {limit:g}: give a number above 0")
    if not args.dry_run and args.dst is None:
        raise UsageError("convert needs DST; without it, only --dry-run is possible")
    env.start(devices)
    from checkpoints_tools.convert import convert
    from checkpoints_tools.dry_run import dry_run

    if args.dry_run:
        return _print(args, *dry_run(args.src, args.dtype, mesh, int(limit * 1e9)))
    start = time.perf_counter()
    with _bar("converting", args.quiet) as (on_total, on_bytes):
        result = convert(
            args.src,
            args.dst,
            dtype=args.dtype,
            **mesh,
            max_host_gb=limit,
            resume=args.resume,
            overwrite=args.overwrite,
            allow_nonfinite=args.allow_nonfinite,
            on_total=on_total,
            on_bytes=on_bytes,
        )
    seconds = time.perf_counter() - start
    result["seconds"] = round(seconds, 2)
    if result["already_complete"]:
        line = (
            f"{result['checkpoint']}: complete already, nothing to do (verify --against {args.src}"
            " would tell whether the source is still the same)"
        )
    else:
        line = (
            f"{result['checkpoint']}: {result['weights']} weights, {result['bytes'] / 1e9:.2f} GB,"
            f" written, read back and compared in {seconds:.1f} s"
        )
    return _print(args, result, line)


def inspect_verb(args: argparse.Namespace) -> int:
    env.start(1)
    from checkpoints_tools.inspect import inspect, lines

    result = inspect(args.path)
    _print(args, result, "\n".join(lines(result, args.weights)))
    return 1 if result["problems"] else 0


def verify_verb(args: argparse.Namespace) -> int:
    if args.tensor is not None and not 1 <= args.tensor <= MOST:
        raise UsageError(f"--tensor {args.tensor}: must be between 1 and {MOST}")
    if args.logits and not args.against:
        raise UsageError("--logits compares with the source: give it with --against SRC")
    env.start(max(8, args.tensor or 1))
    from checkpoints_tools.verify import verify

    with _bar("verifying", args.quiet) as (on_total, on_bytes):
        result = verify(
            args.dst,
            against=args.against,
            tensor=args.tensor,
            on_total=on_total,
            on_bytes=on_bytes,
        )
    if args.logits and not result["problems"]:
        from checkpoints_tools.logits import compare

        result["logits"] = compare(args.dst, args.against, args.logits, result["tensor"])
        result["problems"] += result["logits"]["problems"]
    problems = result["problems"]
    if problems:
        line = "\n".join([f"{result['checkpoint']}: {len(problems)} problem(s)", *problems])
    else:
        line = (
            f"{result['checkpoint']}: all {result['weights']} weights and {result['files']} files"
            f" are what the manifest says, read at tensor={result['tensor']}"
            + (f"; and the same as {args.against}" if args.against else "")
        )
        if "logits" in result:
            line += "\n" + result["logits"]["text"]
    _print(args, result, line)
    return 1 if problems else 0


def export_verb(args: argparse.Namespace) -> int:
    env.start(1)
    from checkpoints_tools.export import export

    with _bar("exporting", args.quiet) as (on_total, on_bytes):
        result = export(args.src, args.dst, on_total=on_total, on_bytes=on_bytes)
    line = (
        f"{result['folder']}: {result['tensors']} tensors, {result['bytes'] / 1e9:.2f} GB in"
        f" {result['files']} file(s)"
    )
    return _print(args, result, line)


def _print(args: argparse.Namespace, result: dict, text: str) -> int:
    print(json.dumps(result) if args.json else text, flush=True)
    return 0


@contextmanager
def _bar(what: str, quiet: bool):
    """(on_total, on_bytes) that draw bytes, speed and time left."""
    bar = tqdm(total=0, unit="B", unit_scale=True, desc=what, disable=quiet, leave=False)

    def on_total(total: int) -> None:
        bar.reset(total)

    def on_bytes(count: int) -> None:
        bar.update(count)

    try:
        yield on_total, on_bytes
    finally:
        bar.close()
