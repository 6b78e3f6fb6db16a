"""`tpjax audit`: compile a model's real step for a target and hold it against its plan."""

import argparse
import json
import re
import sys
import time
from collections import Counter
from dataclasses import asdict

from tpjax import patterns
from tpjax.audit import targets
from tpjax.audit.kernels import Launches, compiled_with_launches
from tpjax.audit.verdict import Audit, Finding
from tpjax.errors import UsageError
from tpjax.planner import models
from tpjax.planner.report import table

DIFFERS = 1  # the exit code where the program is not what the plan states


def audit(args: argparse.Namespace) -> int:
    """Compile, compare, print. Exit code 1 names what differs."""
    model = models.find(args.model, args.dtype)
    for word in ("context", "batch", "data", "tensor", "expert", "layers"):
        value = getattr(args, word)
        if value is not None and value < 1:
            raise UsageError(f"--{word} {value}: must be 1 or more")
    plan, allow = patterns.asked(args.plan, args.allow)
    config = model.config
    if args.layers is not None:
        config = models.shortened(config, args.layers)
    devices = targets.devices(args.hardware)
    asked = {"data": args.data, "expert": args.expert, "tensor": args.tensor}
    sizes = targets.degree(asked, len(devices), args.hardware)
    # Only now: the target decides how jax starts.
    from tpjax.audit import steps

    context = args.context or min(config.max_position, 8192)
    if context > config.max_position and not args.quiet:
        beyond = f"context {context} is beyond the {config.max_position} positions of the model"
        print(f"warning: {beyond}", file=sys.stderr)
    exe = steps.executables(config, devices, sizes, args.batch, context, plan, allow)
    reports = []
    for name in steps.names(exe, args.step, args.batch):
        if not args.quiet:
            print(f"compiling {name} for {args.hardware} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        lowered = exe.lower(name)
        traced = time.perf_counter()
        loop = name.startswith("decode")
        compiled, launches = compiled_with_launches(lowered, exe.options(name), loop)
        seconds = traced - start, time.perf_counter() - traced
        checked = Audit(compiled, exe, name)
        reports.append(_document(checked, launches, seconds))
    bad = any(report["findings"] for report in reports)
    if args.json:
        about = {"model": model.name, "hardware": args.hardware, "layers": config.layers}
        mesh = dict(exe.table.plan.mesh.shape)
        print(json.dumps(about | {"mesh": mesh, "context": context, "steps": reports}))
    else:
        print("\n".join(line for report in reports for line in _lines(report, config.layers)))
    return DIFFERS if bad else 0


def _document(checked: Audit, launches: Launches | None, seconds: tuple[float, float]) -> dict:
    memory = checked.memory
    return {
        "step": checked.name,
        "trace_seconds": round(seconds[0], 2),
        "compile_seconds": round(seconds[1], 2),
        "bytes": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "in_place": memory.alias_size_in_bytes,
        },
        "stated_bytes": {
            "arguments": checked.arguments_stated,
            "temporary": checked.temporary_stated,
            "in_place": checked.cache_stated,
        },
        "collectives": [asdict(one) for one in checked.collectives],
        "launches": asdict(launches) if launches else None,
        "unchecked": list(checked.unchecked),
        "findings": [asdict(finding) for finding in checked.findings()],
    }


def _lines(report: dict, layers: int) -> list[str]:
    held, stated = report["bytes"], report["stated_bytes"]
    out = [
        f"{report['step']}: traced in {report['trace_seconds']:.1f} s, compiled in"
        f" {report['compile_seconds']:.1f} s",
        f"  bytes per device: arguments {held['arguments']:,} (stated {stated['arguments']:,}),"
        f" temporary {held['temporary']:,} (stated {stated['temporary']:,}),"
        f" outputs {held['outputs']:,}, of these in place {held['in_place']:,}",
    ]
    if launches := report["launches"]:
        out.append(
            f"  launches per step: {launches['kernels']} kernels"
            f" ({launches['kernels'] / layers:.1f} per layer, the sampler's included),"
            f" {launches['copies']} copies,"
            f" {launches['collectives']} collectives; {launches['graphs']} CUDA graphs, and"
            f" {launches['outside']} launches in none"
        )
    alike = Counter(
        (
            c["kind"],
            _layers_apart(c["where"]),
            c["dtype"],
            c["bytes"],
            tuple(c["axes"]),
            c["branch"],
        )
        for c in report["collectives"]
    )
    body = [
        (kind, where, f"{n}", dtype, f"{bytes_:,}", " x ".join(axes), "if needed" if branch else "")
        for (kind, where, dtype, bytes_, axes, branch), n in alike.items()
    ]
    head = ("collective", "from", "times", "dtype", "bytes", "over", "")
    out += [f"  {line}" for line in table(head, body, markdown=False)] if body else []
    alike = {}
    for finding in (Finding(**finding) for finding in report["findings"]):
        key = re.sub(r"blocks\.\d+", "blocks.*", str(finding))
        alike.setdefault(key, []).append(finding)
    for found in alike.values():
        more = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
        out.append(f"  DIFFERS {found[0]}{more}")
    if not alike:
        moved = "" if report["unchecked"] else ", nothing large copied"
        out.append(f"  as stated: collectives, bytes, the cache in place{moved}")
    if report["unchecked"]:
        out.append("  not checked: moves; this compiler prefetches weights, which looks the same")
    return out


def _layers_apart(where: str) -> str:
    """``blocks.*.attn.o``: layers are counted together."""
    parts = where.split(".")
    return ".".join(["blocks", "*", *parts[2:]]) if parts[0] == "blocks" else where
