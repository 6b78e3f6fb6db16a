"""Bytes on each device: weights, cache and what steps hold for a moment.

Weights, cache and inputs are exact: they are what the compiled step takes as arguments. Temporaries
are a model of what XLA:GPU does with tpjax's steps. BENCHMARKS.md, "The plan beside the compiler",
compares both with the compiler's own numbers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from tpjax.buckets import CHUNKS, at_a_time, positions
from tpjax.config import ModelConfig, itemsize
from tpjax.inventory import weights
from tpjax.parallel.layout import Layout
from tpjax.params import COLUMNS
from tpjax.planner.chips import Chip

MIB = 1 << 20
# Of a device's memory, what weights, cache and temporaries may take: jax's allocator gets 92 %
# (`tpjax.env`), the rest is the driver's, the communication library's and the graphs'.
USABLE = 0.92


@dataclass(frozen=True)
class Memory:
    """Bytes per device."""

    weights: int
    cache: int
    temporary: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporary


def usable(chip: Chip) -> int:
    """Bytes of a device that a model may take."""
    return int(USABLE * chip.memory)


class Footprint:
    """One replica of a model on some devices. ``weight_bytes``, ``kv_bytes``: of an element, where
    they are not the model's dtype; ``stage``: into how many groups of layers it is cut."""

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        *,
        stage: int = 1,
        weight_bytes: int | None = None,
        kv_bytes: int | None = None,
    ):
        self.config, self.layout, self.stage = config, layout, stage
        self.inventory = tuple(weights(config, layout, weight_bytes))
        in_layers = sum(w.bytes_per_device for w in self.inventory if w.path.startswith("blocks."))
        self.ends = sum(w.bytes_per_device for w in self.inventory) - in_layers
        self.layers = -(-in_layers // stage)
        size = itemsize(config.dtype)
        self.per_token = layout.cached_per_token(config) * (kv_bytes or size) // size

    def cache(self, rows: int, context: int) -> int:
        """Keys and values of ``rows`` sequences; the context is whole chunks."""
        return -(-rows * positions(context) * self.per_token // self.stage)

    def memory(self, rows: int, context: int) -> Memory:
        """With ``rows`` sequences of ``context`` positions on each replica: those that are decoded
        and, unless it is a single one in all, one more that is being prefilled."""
        return Memory(
            weights=self.ends + self.layers,
            cache=self.cache(rows + (rows * self.layout.data > 1), context),
            temporary=max(
                temporary(self.config, self.layout, rows, 1, context),
                temporary(self.config, self.layout, 1, min(CHUNKS[-1], context), context),
            ),
        )

    def arguments(self, rows: int, tokens: int, context: int) -> int:
        """What a step takes: weights, cache and inputs. ``tokens``: 1 is decode."""
        every = rows * self.layout.data
        if tokens == 1:
            inputs = every * COLUMNS + 1
        else:  # a prompt's length is an input only of ropes that depend on it
            ropes = (self.config.rope, self.config.rope_local)
            grows = any(rope is not None and rope.grows for rope in ropes)
            inputs = every * (tokens + 2 + grows + COLUMNS)
        return self.ends + self.layers + self.cache(rows, context) + 4 * inputs

    def most_rows(self, context: int, usable: int) -> int:
        """The most sequences of a replica that fit."""
        return _largest(lambda n: self.memory(n, context).total <= usable, 1 << 16)

    def longest_context(self, rows: int, usable: int) -> int:
        """The longest context at which this many sequences fit, in whole chunks; at most what the
        model has positions for."""
        chunk = CHUNKS[-1]
        chunks = -(-self.config.max_position // chunk)
        most = _largest(lambda n: self.memory(rows, n * chunk).total <= usable, chunks)
        return min(most * chunk, self.config.max_position)


def temporary(config: ModelConfig, layout: Layout, rows: int, tokens: int, context: int) -> int:
    """What a step of ``tokens`` tokens of each of ``rows`` sequences holds for a moment, beside the
    residual stream in float32: the scores of one layer in float32 and their shares in the model's
    dtype; or the normalised stream, what the MLP makes of it, and a partial sum in float32; or what
    the sampler makes of the logits. One token's scores are of all positions, those of several of a
    block of positions, beside the result so far."""
    c, size = config, itemsize(config.dtype)
    many, there = rows * tokens, positions(context)
    attention, dense, sparse = _layers(c, layout)
    heads = max(len(here.heads(c).queries) // here.shards("heads") for here in attention)
    seen = there if tokens == 1 else at_a_time(there)
    scores = many * heads * seen * (4 + size)
    if seen < there:
        scores += 8 * many * heads * c.head_dim
    head = layout.at("embed" if c.tie_embeddings else "head")
    vocab = head.dim("vocab", c.vocab).size // head.shards("vocab")
    width = max((h.dim("mlp", c.mlp).size // h.shards("mlp") for h in dense), default=0)
    stream = 4 * many * c.embed
    around = many * c.embed * (size if layout.tensor_degree == 1 else size + 4)
    if c.norm_place == "around":  # what comes before the second norm
        around += 4 * many * c.embed
    mixture = max((_of_experts(c, here, many) for here in sparse), default=0)
    inside = max(many * width * (4 + size), mixture)
    sampled = 16 * rows * vocab
    return max(scores + stream, stream + around + inside, sampled) + MIB


@functools.lru_cache(maxsize=64)
def _layers(config: ModelConfig, layout: Layout) -> tuple[list[Layout], list[Layout], list[Layout]]:
    """The distinct layouts of attention, of MLPs and of mixtures; one each, unless a plan leaves
    some layers whole."""
    kinds: tuple[dict[Layout, None], ...] = ({}, {}, {})
    for n in range(config.layers):
        sparse = config.is_sparse(n)
        kinds[0][layout.at(f"blocks.{n}.attn")] = None
        kinds[1 + sparse][layout.at(f"blocks.{n}.{'moe' if sparse else 'mlp'}")] = None
    attention, dense, mixtures = map(list, kinds)
    return attention, dense, mixtures


def _of_experts(config: ModelConfig, here: Layout, rows: int) -> int:
    """Two matrices of an expert, where its rows are multiplied together and it is not alone on its
    device: they are cut out first. And what is made of all rows so far, in float32."""
    moe = config.moe
    assert moe is not None
    experts, width = here.dim("experts", moe.experts), here.dim("expert_mlp", moe.mlp)
    local = experts.size // here.shards("experts")
    if moe.pair_by_pair(rows, local):
        return 0
    matrix = width.size // here.shards("expert_mlp") * config.embed * itemsize(config.dtype)
    return 4 * rows * config.embed + (2 * matrix if local > 1 else 0)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
