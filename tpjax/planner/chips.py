"""Hardware: what a chip can do and how chips are joined, from chips.toml or a file like it."""

import difflib
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tpjax.errors import UsageError

TABLE = Path(__file__).with_name("chips.toml")
ALIASES = {
    "a100-80": "a100",
    "a100-sxm": "a100",
    "h100-sxm": "h100",
    "h200-sxm": "h200",
    "4090": "rtx4090",
    "rtx-4090": "rtx4090",
    "5090": "rtx5090",
    "rtx-5090": "rtx5090",
    "tpu-v5e": "v5e",
    "tpu-v5p": "v5p",
    "tpu-v6e": "v6e",
    "tpu-v7": "v7",
    "tpu7x": "v7",
}


@dataclass(frozen=True)
class Link:
    """How devices reach each other. ``gbs``: 1e9 bytes per second of one device in one direction.
    ``direct``: without the host in between."""

    kind: str
    gbs: float
    direct: bool = True


@dataclass(frozen=True)
class Chip:
    """One device. ``memory``: bytes a program can see; ``bandwidth``: bytes per second;
    ``flops``: dtype -> operations per second; ``target``: what its compiler is asked for."""

    key: str
    name: str
    memory: int
    bandwidth: float
    flops: dict[str, float]
    link: Link
    network: Link
    node: int
    source: str
    target: str | None = None

    def peak(self, dtype: str) -> float:
        """Operations per second with operands of this dtype; of bfloat16 where it is not told."""
        for wider in (dtype, "bfloat16"):
            if wider in self.flops:
                return self.flops[wider]
        return max(self.flops.values())


@dataclass(frozen=True)
class Hardware:
    """``devices`` chips, ``nodes`` times as many in all."""

    chip: Chip
    devices: int
    nodes: int = 1

    @property
    def total(self) -> int:
        return self.devices * self.nodes

    def crosses(self, degree: int) -> bool:
        """Whether some group of ``degree`` neighbours has devices of several nodes."""
        return self.nodes > 1 and (degree > self.devices or self.devices % degree > 0)

    def link(self, degree: int) -> Link:
        """The slowest link among ``degree`` neighbours."""
        return self.chip.network if self.crosses(degree) else self.chip.link

    def __str__(self) -> str:
        nodes = f" x {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.devices} x {self.chip.name}{nodes}"


@cache
def chips(file: Path | None = None) -> dict[str, Chip]:
    """Key -> chip, of the table and then of a user's own file. Raises UsageError naming the key and
    the word that is missing or wrong there."""
    found = _read(TABLE)
    return found | _read(file) if file else found


def parse(text: str, file: Path | None = None) -> Hardware:
    """``h100:8``, ``h100:8x4`` (four nodes of eight) or ``h100`` (one). Raises UsageError."""
    match = re.fullmatch(r"([^:]+)(?::(\d+)(?:x(\d+))?)?", text.strip().lower())
    if not match:
        raise UsageError(f"hardware {text!r}: write h100:8, or h100:8x4 for four nodes of eight")
    known = chips(file)
    key = ALIASES.get(match[1], match[1])
    if key not in known:
        near = difflib.get_close_matches(key, [*known, *ALIASES], n=3, cutoff=0.3)
        raise UsageError(
            f"hardware {match[1]!r}: not known; nearest: {', '.join(near) or ', '.join(known)};"
            " --hardware-file adds your own"
        )
    chip, devices, nodes = known[key], int(match[2] or 1), int(match[3] or 1)
    if not 1 <= devices <= chip.node or nodes < 1:
        raise UsageError(
            f"hardware {text!r}: a node of {chip.name} has 1 to {chip.node} devices;"
            f" several nodes are {key}:{chip.node}x2"
        )
    return Hardware(chip, devices, nodes)


def _read(file: Path) -> dict[str, Chip]:
    try:
        raw = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file}: not a hardware file ({error})") from error
    return {key.lower(): _chip(file, key.lower(), entry) for key, entry in raw.items()}


def _chip(file: Path, key: str, entry: object) -> Chip:
    where = f"{file}: [{key}]"
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: not a table of a chip's numbers")

    def number(word: str, table: dict = entry) -> float:
        value = table.get(word)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UsageError(f"{where}: {word}={value!r}: must be a number above 0")
        return value

    def link(word: str) -> Link:
        about = entry.get(word)
        if not isinstance(about, dict) or "kind" not in about:
            raise UsageError(f"{where}: {word} must have a kind and gbs")
        return Link(str(about["kind"]), number("gbs", about), bool(about.get("direct", True)))

    flops = entry.get("flops")
    if not isinstance(flops, dict) or not flops:
        raise UsageError(f"{where}: flops must be a table of dtypes")
    return Chip(
        key=key,
        name=str(entry.get("name", key)),
        memory=int(number("memory_gb") * 1e9),
        bandwidth=number("bandwidth") * 1e12,
        flops={dtype: number(dtype, flops) * 1e12 for dtype in flops},
        link=link("link"),
        network=link("network"),
        node=int(number("node")),
        source=str(entry.get("source", "a file of the user's")),
        target=entry.get("target"),
    )
