"""Examples run as written."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_add_a_family():
    """A family added in less than 60 lines, equal to transformers on three devices."""
    script = EXAMPLES / "add_a_family.py"
    assert len(script.read_text().splitlines()) < 60
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    difference, tokens = done.stdout.splitlines()
    assert float(difference.split()[-1]) < 1e-4 and len(tokens.split(",")) == 16
    assert "padding: heads 8 -> 12, kv_heads 4 -> 6, mlp 100 -> 102" in done.stderr
