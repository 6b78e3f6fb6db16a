"""Where a measurement came from, and its rows in the tables of a Markdown file."""

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
BESIDE = "## Recorded beside other systems"
BESIDE_COLUMNS = (
    "date | commit | model | dtype | mesh | batch | prompt | what | tok/s | beside | tok/s"
    " | ratio (least to most) | read GB/s | versions | command"
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
    """Add the rows at the ends of their tables in ``file``, which appears whole or not at all."""
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else "# Benchmarks\n"
        text = _with_row(text, HEADING, COLUMNS, row(result))
        for line in beside(result):
            text = _with_row(text, BESIDE, BESIDE_COLUMNS, line)
        partial = file.with_name(file.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise UsageError(f"--record {file}: {error.strerror or error}") from error


def _with_row(text: str, heading: str, columns: str, line: str) -> str:
    lines = text.rstrip().splitlines()
    if heading not in lines:
        rule = "|".join("---" for _ in columns.split("|"))
        lines += ["", heading, "", f"| {columns} |", f"|{rule}|"]
    at = lines.index(heading) + 1
    while at < len(lines) and not lines[at].startswith(("|", "## ")):  # said before the table
        at += 1
    while at < len(lines) and lines[at].startswith("|"):
        at += 1
    return "\n".join([*lines[:at], line, *lines[at:]]) + "\n"


def row(r: dict) -> str:
    """One line of the table of runs."""
    cells = (
        *_shape(r),
        "-" if r["load_s"] is None else r["load_s"],
        r["compile_s"],
        r["prefill_tok_s"],
        _rate(r["decode_tok_s"], r["decode_tok_s_spread"]) if "decode_tok_s" in r else "-",
        r.get("ms_per_token", "-"),
        _bandwidth(r),
        *_origin(r),
    )
    return _line(cells)


def beside(r: dict) -> list[str]:
    """A line for every peer and what was measured of it."""
    lines = []
    for name, peer in r["peers"].items():
        for what in ("prefill", "decode"):
            if f"{what}_ratio" not in peer:
                continue
            least, median, most = peer[f"{what}_ratio"]
            cells = (
                *_shape(r),
                what,
                _rate(r[f"{what}_tok_s"], r[f"{what}_tok_s_spread"]),
                f"{name} ({peer['about']})",
                peer[f"{what}_tok_s"],
                f"{median} ({least} to {most})",
                _bandwidth(r),
                *_origin(r),
            )
            lines.append(_line(cells))
    return lines


def _shape(r: dict) -> tuple:
    mesh = " x ".join(f"{name}={size}" for name, size in r["mesh"].items() if size > 1) or "1"
    model = Path(r["model"]).name.removesuffix(".json")
    return r["date"], r["commit"], model, r["dtype"], mesh, r["batch"], r["prompt_length"]


def _rate(rate: float, spread: list[float]) -> str:
    return f"{rate} ({spread[0]} to {spread[1]})"


def _bandwidth(r: dict) -> str:
    share = f" ({r['read_bandwidth_share']:.0%})" if "read_bandwidth_share" in r else ""
    return f"{r['read_bandwidth'] / 1e9:.1f}{share}"


def _origin(r: dict) -> tuple[str, str]:
    return r["versions"], f"`{r['command']}`"


def _line(cells: tuple) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
