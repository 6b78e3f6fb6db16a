"""The host's memory. No jax."""

from pathlib import Path

import psutil


def free_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Free bytes of host memory, or of the container's share where that is less. Cached files are
    given back when needed, so they count as free."""
    available = psutil.virtual_memory().available
    for limit, used, cached in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            free = int((root / limit).read_text()) - int((root / used).read_text())
            stat = dict(line.split() for line in (root / cached).read_text().splitlines())
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
        free += int(stat.get("inactive_file", 0))
        available = min(available, max(0, free))
    return available
