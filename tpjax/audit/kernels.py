"""What XLA:GPU will launch for a program: kernels, copies, collectives, and which of them run as
one CUDA graph. Read from the compiler's own list, which it writes into a folder it is given."""

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

_THUNK = re.compile(r"^(\s*)\d+: k(\w+)\s")
_NO_LAUNCH = {"CommandBuffer", "AsyncStart", "AsyncDone", "PartitionId", "ReplicaId", "While"}
_BRANCHING = {"Conditional"}


@dataclass(frozen=True)
class Launches:
    """Of one step: of decode, of one token. ``graphs``: CUDA graphs; ``outside``: launches that are
    in none. What runs only in a branch is not counted."""

    kernels: int
    copies: int
    collectives: int
    graphs: int
    outside: int


def compiled_with_launches(
    lowered: jax.stages.Lowered, options: Mapping[str, str | bool], loop: bool = True
) -> tuple[jax.stages.Compiled, Launches | None]:
    """The compiled program and, where the compiler tells, what it launches: of decode, which is a
    ``loop`` over tokens, one turn. ``options``: as `Executables.options` has them."""
    with tempfile.TemporaryDirectory(prefix="tpjax-audit-") as folder:
        with warnings.catch_warnings():  # what jax keeps of programs it cannot read without a GPU
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            compiled = lowered.compile({**options, "xla_dump_to": folder})
        lists = list(Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt"))
        return compiled, _launches(lists[0].read_text(), loop) if lists else None


def _launches(text: str, loop: bool) -> Launches:
    count = {"kernel": 0, "copy": 0, "collective": 0, "graph": 0, "outside": 0}
    for kind, in_graph in _run_each_step(text, loop):
        if kind == "CommandBuffer":
            count["graph"] += 1
        if kind in _NO_LAUNCH:
            continue
        of = (
            "copy"
            if "Copy" in kind or "Memset" in kind or "Memzero" in kind
            else "collective"
            if kind.startswith(("All", "Reduce", "Collective"))
            else "kernel"
        )
        count[of] += 1
        count["outside"] += not in_graph
    return Launches(
        count["kernel"], count["copy"], count["collective"], count["graph"], count["outside"]
    )


def _run_each_step(text: str, loop: bool) -> Iterator[tuple[str, bool]]:
    """Every thunk of the loop's body, or of the program where there is no loop, and whether a graph
    holds it; branches left out."""
    lines = text.splitlines()
    loops = loop and [
        n for n, line in enumerate(lines) if line.strip() == "body:" and _depth(line) <= 2
    ]
    if loops:
        lines = lines[loops[0] + 1 :]
        depth = _depth(lines[0])
    else:
        depth = 0
    graph = branch = None
    for line in lines:
        match, at = _THUNK.match(line), _depth(line)
        if match and at < depth:
            break
        if not match:
            continue
        if graph is not None and at <= graph:
            graph = None
        if branch is not None and at <= branch:
            branch = None
        if branch is not None:
            continue
        kind = match[2]
        if kind in _BRANCHING:
            branch = at
            continue
        if kind == "CommandBuffer":
            graph = at
        yield kind, graph is not None and at > graph


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())
