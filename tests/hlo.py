"""Reading a compiled program: its collectives, its large copies, its memory; and the verdict."""

import math
import re
from collections import Counter
from collections.abc import Iterator

from tpjax.config import ModelConfig, itemsize
from tpjax.executables import Executables
from tpjax.ops.experts import TILE
from tpjax.ops.sample import collectives as collectives_stated
from tpjax.ops.topk import CANDIDATES
from tpjax.sampling import COLUMNS

MIB = 1 << 20
Shape = tuple[int, ...]
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    r"|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
_MOVE = re.compile(r"= \(?(\w+\[[\d,]*\]).* (?:copy|transpose|copy-start)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(text: str) -> Counter:
    """How many of each kind the program's text holds."""
    return Counter(kind for _, kind in _COLLECTIVE.findall(text))


def largest(text: str, kind: str) -> int:
    """Bytes of the largest array that a collective of this kind takes or makes."""
    return max(
        (
            _bytes(t)
            for types, k in _COLLECTIVE.findall(text)
            if k == kind
            for t in _ARRAY.findall(types)
        ),
        default=0,
    )


def moves(text: str) -> Iterator[tuple[str, int, Shape]]:
    """Every copy and transpose: its line, how many bytes, and the sizes above one."""
    for line in text.splitlines():
        if move := _MOVE.search(line):
            array = _ARRAY.findall(move[1])[0]
            sizes = tuple(n for n in map(int, filter(None, array[1].split(","))) if n > 1)
            yield line.strip()[:160], _bytes(array), sizes


def large_moves(text: str, limit: int = MIB) -> list[str]:
    """Copies and transposes of more than ``limit`` bytes."""
    return [line for line, size, _ in moves(text) if size > limit]


def _bytes(array: tuple[str, str]) -> int:
    dtype, shape = array
    return math.prod(int(n) for n in shape.split(",") if n) * _BYTES.get(dtype, 8)


def parts(whole: int, n: int) -> int:
    """The largest of ``n`` parts."""
    return -(-whole // n)


def heads_each(config: ModelConfig, devices: int) -> tuple[int, int]:
    """Key/value heads and query heads on each device, of the way with the fewest (key/value heads
    count twice), where whole key/value heads are on equally many devices that share their query
    heads."""
    ways = []
    for shards in range(1, devices + 1):
        if devices % shards == 0:
            kv = parts(config.kv_heads, shards)
            queries = kv * parts(config.heads // config.kv_heads, devices // shards)
            ways.append((queries + 2 * kv, kv, queries))
    _, kv, queries = min(ways)
    return kv, queries


def weights_each(config: ModelConfig, devices: int, expert: int = 1) -> list[Shape]:
    """The shapes of what each of ``devices`` holds, from the architecture's numbers alone.
    ``expert``: over how many of them whole experts are placed."""
    c, n, D, H = config, devices, config.embed, config.head_dim
    kv, queries = heads_each(c, n)
    width, vocab = c.embed_in or D, parts(c.vocab, n)

    def norm(size: int) -> list[Shape]:
        return [(size,)] * (2 if c.norm == "layer" else 1)

    def linear(out: int, in_: int, bias: bool) -> list[Shape]:
        return [(out, in_)] + [(out,)] * bias

    def mlp(F: int) -> list[Shape]:
        columns = linear(F, D, c.mlp_bias) * (2 if c.gated else 1)
        return columns + linear(D, F, c.mlp_bias)

    def mixture() -> list[Shape]:
        moe = c.moe
        E, F = parts(moe.experts, expert), parts(moe.mlp, n // expert)
        shared = [*mlp(parts(moe.shared_mlp, n)), (1, D)] if moe.shared_mlp else []
        return [(moe.experts, D), (E, F, D), (E, F, D), (E, D, F), *shared]

    out = [(vocab, width)] * (1 if c.tie_embeddings else 2)
    out += norm(D) if c.final_norm else []
    out += [(c.learned_positions, D)] if c.learned_positions else []
    out += [(D, width), (width, D)] if c.embed_in else []
    for layer in range(c.layers):
        out += linear(queries * H, D, c.qkv_bias) + 2 * linear(kv * H, D, c.qkv_bias)
        out += linear(D, queries * H, c.o_bias)
        out += 2 * norm(H) if c.qk_norm else []
        out += (4 if c.norm_place == "around" else 2) * norm(D)
        out += mixture() if c.is_sparse(layer) else mlp(parts(c.mlp, n))
    return out


def problems(compiled, exe: Executables, name: str, greedy: bool = False) -> list[str]:
    """What is wrong with a compiled step, ``decode[b8]`` or ``prefill[t512]``, from the
    architecture's numbers: the plan is asked for nothing but the sizes of its mesh, so that a wrong
    plan cannot excuse itself. ``greedy``: the sampler was compiled for nothing else."""
    c, plan = exe.table.config, exe.table.plan
    data, expert = plan.mesh.shape["data"], plan.mesh.shape["expert"]
    n = plan.mesh.size // data
    kind, number = name[:-1].split("[")
    decode, number = kind == "decode", int(number[1:])
    rows, tokens = (number, 1) if decode else (data, number)
    each = rows // data  # of every replica
    context, size = exe.buckets.context, itemsize(c.dtype)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    found = []

    def no_more(what: str, have: int, limit: int) -> None:
        if have > limit:
            found.append(f"{what}: {have} bytes, more than {limit}")

    seen = collectives(text)
    reduces = 2 * c.layers + 1 if n > 1 else 0
    if seen["all-reduce"] != reduces:
        found.append(f"all-reduces: {seen['all-reduce']}, not {reduces}")
    stated = collectives_stated(plan)["all-gather"] if not greedy else int(n > 1)
    # A vocabulary of few candidates per device makes some branches impossible; they vanish.
    every = greedy or (c.vocab // n > CANDIDATES and plan.platform == "cpu")
    if seen["all-gather"] > stated or (every and seen["all-gather"] != stated):
        found.append(f"all-gathers: {seen['all-gather']}, the sampler states {stated}")
    if others := seen.keys() - {"all-reduce", "all-gather"}:
        found.append(f"other collectives: {sorted(others)}")
    cpu = plan.platform == "cpu"
    # Of a single row in 16 bits a CPU makes two, see nn/linear.py.
    stream = each * max(tokens, 1 + (cpu and size == 2)) * c.embed * 4
    no_more("all-reduce", largest(text, "all-reduce"), stream)
    no_more("all-gather", largest(text, "all-gather"), plan.mesh.size * rows * CANDIDATES * 8)

    kv, queries = heads_each(c, n)
    weights = weights_each(c, n, expert)
    cache = 2 * c.layers * each * kv * context * c.head_dim * size
    # A prompt's length is an input only of ropes that depend on it.
    grows = any(rope is not None and rope.grows for rope in (c.rope, c.rope_local))
    inputs = 4 * (rows * COLUMNS + 1 if decode else rows * (tokens + 2 + grows + COLUMNS))
    expected = sum(map(math.prod, weights)) * size + cache + inputs
    if memory.argument_size_in_bytes != expected:
        found.append(f"arguments: {memory.argument_size_in_bytes} bytes, not {expected}")
    if memory.alias_size_in_bytes != cache:
        found.append(f"aliased: {memory.alias_size_in_bytes} bytes, the cache has {cache}")

    # Scores in float32 and once more as shares, a few activations, and the logits' sort.
    scores = each * tokens * queries * context * (4 + size)
    logits = each * parts(c.vocab, n) * 4
    widest = max(c.embed, parts(c.mlp, n), queries * c.head_dim)
    temporary = scores + 16 * each * tokens * widest + 8 * logits + MIB
    no_more("temporary", memory.temp_size_in_bytes, 64 * MIB if cpu else temporary)
    if rows == tokens == 1 and (experts := [shape for shape in weights if len(shape) == 3]):
        matrix = min(math.prod(shape[1:]) for shape in experts) * size
        if not cpu or matrix > TILE:  # what a CPU does copy
            no_more("temporary beside an expert", memory.temp_size_in_bytes, matrix - 1)

    # New queries and keys may be transposed, head by head; weights never.
    limit = max(MIB, each * tokens * queries * c.head_dim * size if tokens > 1 else 0)
    matrices = {tuple(sorted(n for n in shape if n > 1)) for shape in weights if len(shape) > 1}
    for line, moved, sizes in moves(text):
        of_weight = not cpu and tuple(sorted(sizes)) in matrices and tokens not in sizes
        if moved > limit or of_weight:
            found.append(f"moves: {line}")
    return found
