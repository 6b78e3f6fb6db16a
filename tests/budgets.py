"""What compiled steps may cost: budgets.json holds each one's bytes, collectives and launches.

python -m tests.budgets    # writes the file anew; look at the difference before it is committed
"""

import json
import math
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.audited import steps
from tests.published import published
from tpjax import env
from tpjax.audit.kernels import compiled_with_launches
from tpjax.audit.verdict import Audit

FILE = Path(__file__).parent / "data/budgets.json"
EIGHT = {"tensor": 8}
MODELS = {
    "llama-3.2-3b": EIGHT,
    "mistral-7b-v0.1": EIGHT,
    "mixtral-8x7b-v0.1": EIGHT,
    "qwen2.5-7b-instruct": EIGHT,  # 28 heads: padded
    "qwen1.5-moe-a2.7b": EIGHT,
    "qwen3-8b": EIGHT,
    "qwen3-30b-a3b": EIGHT,
    "gemma-2b": EIGHT,
    "gemma-2-9b-it": EIGHT,
    "gemma-3-1b-it": {"tensor": 4},  # it has four heads
    "phi-3-mini-4k": EIGHT,
    "opt-125m": EIGHT,  # 12 heads: padded
}
STEPS = ("decode[b1]", "prefill[t512]")
CASES = [(name, sizes, step) for name, sizes in MODELS.items() for step in STEPS] + [
    ("mixtral-8x7b-v0.1", {"expert": 8}, "decode[b1]"),
    ("llama-3.2-3b", {"tensor": 5}, "decode[b1]"),
]


def key(name: str, sizes: dict[str, int], step: str) -> str:
    return f"{name} {' x '.join(f'{a}={n}' for a, n in sizes.items())} {step}"


def audit(name: str, sizes: dict[str, int], step: str, layers: int = 2) -> tuple[Audit, dict]:
    """Compiled for H100s with layers of every kind and a sampler for greedy requests only (see the
    fixture ``greedy``): the audit, and what is in the budget."""
    exe = steps(published(name, layers), f"h100:{math.prod(sizes.values())}", **sizes)
    compiled, launches = compiled_with_launches(
        exe.lower(step), exe.options(step), step.startswith("decode")
    )
    found = Audit(compiled, exe, step, greedy=True)
    assert launches is not None
    return found, {
        "arguments": found.memory.argument_size_in_bytes,
        "temporary": found.memory.temp_size_in_bytes,
        "collectives": dict(sorted(Counter(one.kind for one in found.collectives).items())),
        "summed": sum(one.bytes for one in found.collectives if one.kind == "all-reduce"),
        "launches": asdict(launches),
    }


def within(have: dict, budget: dict) -> list[str]:
    """What is over budget: bytes and collectives at all, temporaries by 10 %, launches by one."""
    over = [
        f"{word}: {have[word]}, the budget says {budget[word]}"
        for word in ("arguments", "collectives", "summed")
        if have[word] != budget[word]
    ]
    if have["temporary"] > 1.1 * budget["temporary"]:
        over.append(f"temporary: {have['temporary']}, the budget says {budget['temporary']}")
    for word, most in budget["launches"].items():
        if have["launches"][word] > most:
            over.append(f"{word}: {have['launches'][word]}, the budget says {most}")
    return over


def main() -> int:
    import jax.numpy as jnp

    from tpjax.ops import sample

    env.start()
    sample._any = lambda flag_B, axes: jnp.bool_(False)
    FILE.write_text(json.dumps({key(*case): audit(*case)[1] for case in CASES}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
