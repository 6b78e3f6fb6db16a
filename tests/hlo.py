"""Reading a compiled program: its collectives, its large copies, its memory; and the verdict."""

import math
import re
from collections import Counter

from tpjax.cache import KVCache
from tpjax.config import ModelConfig
from tpjax.ops.sample import collectives as collectives_stated
from tpjax.ops.topk import CANDIDATES
from tpjax.plan import Plan

MIB = 1 << 20
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
    r"|ragged-all-to-all)(?:-start)?\("
)
_MOVE = re.compile(r"= \(?(\w+)\[([\d,]*)\].* (?:copy|transpose|copy-start)\(")


def collectives(text: str) -> Counter:
    """How many of each kind the program's text holds."""
    return Counter(_COLLECTIVE.findall(text))


def large_moves(text: str, limit: int = MIB) -> list[str]:
    """Copies and transposes of more than ``limit`` bytes."""
    found = []
    for line in text.splitlines():
        if move := _MOVE.search(line):
            dtype, shape = move.groups()
            elements = math.prod(int(n) for n in shape.split(",") if n)
            if elements * _BYTES.get(dtype, 8) > limit:
                found.append(line.strip()[:160])
    return found


def decode_problems(compiled, config: ModelConfig, plan: Plan, rows: int, context: int) -> list:
    """What is wrong with a compiled decode step, from the architecture's numbers alone: the plan is
    asked for nothing but its sizes, so that a wrong plan cannot excuse itself."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    tensor = plan.tensor_degree
    problems = []

    seen = collectives(text)
    reduces = 2 * config.layers + 1 if tensor > 1 else 0
    if seen.pop("all-reduce", 0) != reduces:
        problems.append(f"all-reduces: {collectives(text)['all-reduce']}, not {reduces}")
    stated = collectives_stated(plan)["all-gather"]
    gathers = seen.pop("all-gather", 0)
    # A vocabulary of few candidates per device makes some branches impossible; they vanish.
    every = config.vocab // tensor > CANDIDATES and plan.platform == "cpu"
    if gathers > stated or (every and gathers != stated):
        problems.append(f"all-gathers: {gathers}, the sampler states {stated}")
    if seen:
        problems.append(f"other collectives: {dict(seen)}")

    c = config
    size = {"float32": 4, "bfloat16": 2}[c.dtype]
    per_layer = 2 * c.embed * (c.heads + c.kv_heads) * c.head_dim + 3 * c.embed * c.mlp
    tables = (1 if c.tie_embeddings else 2) * plan.padded("vocab", c.vocab) * c.embed
    split = (c.layers * per_layer + tables) // tensor
    norms = (2 * c.layers + 1) * c.embed
    # Key/value projections are repeated over rep, so that much more is allowed.
    again = (
        c.layers * 2 * c.embed * c.kv_heads * c.head_dim * (plan.mesh.shape["rep"] - 1) // tensor
    )
    cache = 2 * c.layers * rows * c.kv_heads * context * c.head_dim * size
    cache //= plan.data * plan.mesh.shape["tensor"]
    assert cache == KVCache.bytes_per_device(config, plan, rows, context)
    expected = (split + norms + again) * size + cache
    if not expected <= memory.argument_size_in_bytes <= expected + MIB:
        problems.append(f"arguments: {memory.argument_size_in_bytes} bytes, not {expected}")
    if memory.alias_size_in_bytes != cache:
        problems.append(f"aliased: {memory.alias_size_in_bytes} bytes, the cache has {cache}")
    if memory.temp_size_in_bytes > 64 * MIB:
        problems.append(f"temporary: {memory.temp_size_in_bytes / MIB:.0f} MiB")
    problems += [f"moves: {line}" for line in large_moves(text)]
    return problems
