"""Where a measurement came from, and its row in a Markdown table."""

import datetime
import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path

import flax
import jax

from tpjax import __version__
from tpjax.errors import UsageError

HEADING = "## Recorded runs"
COLUMNS = (
    "date | commit | model | dtype | mesh | batch | prompt | load s | compile s"
    " | prefill tok/s | decode tok/s (spread) | ms/token | read GB/s (share) | versions | command"
)


def provenance() -> dict:
    """Date, commit, versions, device and command of this run."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "versions": f"tpjax {__version__}, jax {jax.__version__}, jaxlib"
        f" {importlib.metadata.version('jaxlib')},"
        f" flax {flax.__version__}",
        "device": jax.devices()[0].device_kind,
        "command": shlex.join(["tpjax", *sys.argv[1:]]),
    }


def _commit() -> str:
    """The commit this package's source is at, with a + if it was changed since; "installed" where
    there is no source tree."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = "+" if git("status", "--porcelain", "--", str(here.parent)) else ""
        return git("rev-parse", "--short", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return "installed"


def append(file: Path, result: dict) -> None:
    """Add the row under its heading at the end of ``file``, which appears whole or not at all."""
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else "# Benchmarks\n"
        if HEADING not in text:
            line = "|".join("---" for _ in COLUMNS.split("|"))
            text = f"{text.rstrip()}\n\n{HEADING}\n\n| {COLUMNS} |\n|{line}|\n"
        partial = file.with_name(file.name + ".partial")
        partial.write_text(f"{text.rstrip()}\n{row(result)}\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise UsageError(f"--record {file}: {error.strerror or error}") from error


def row(r: dict) -> str:
    """One line of the table."""
    low, high = r["decode_tok_s_spread"]
    mesh = " x ".join(f"{name}={size}" for name, size in r["mesh"].items() if size > 1) or "1"
    cells = (
        r["date"],
        r["commit"],
        Path(r["model"]).stem,
        r["dtype"],
        mesh,
        r["batch"],
        r["prompt_length"],
        "-" if r["load_s"] is None else r["load_s"],
        r["compile_s"],
        r["prefill_tok_s"],
        f"{r['decode_tok_s']} ({low} to {high})",
        r["ms_per_token"],
        f"{r['read_bandwidth'] / 1e9:.1f} ({r['read_bandwidth_share']:.0%})",
        r["versions"],
        f"`{r['command']}`",
    )
    return "| " + " | ".join(map(str, cells)) + " |"
