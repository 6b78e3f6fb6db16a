"""The shapes steps are compiled for. No jax: the planner counts with them too.

Only what changes a shape is in a bucket: tokens per prefill chunk, sequences per decode, and cache
positions, of which steps on accelerators read all there are.
"""

from dataclasses import dataclass
from itertools import pairwise

DISPATCH = 32  # most tokens one decode dispatch makes for each sequence
CHUNKS = (32, 128, 512)  # prefill: tokens per call; longer prompts take several
SHORT, CALL = 8, 8  # where prompts are cut to fit: one more of these; tokens that a call costs
LEAST, SHORTER = 1024, 4  # positions a shorter cache has at least; how much shorter it is
BLOCK = 512  # cache positions attended to at a time, where there are more than twice as many


@dataclass(frozen=True)
class Buckets:
    """The shapes that will ever run.

    ``context``: cache positions per sequence, enough for ``max_model_len`` in whole chunks.
    ``batch``: sequences per decode, all replicas together. ``chunks``: tokens per prefill call.
    ``fitted``: whether a call takes as long as its tokens do, padding among them, as on a CPU.
    """

    context: int
    batch: tuple[int, ...]
    chunks: tuple[int, ...]
    fitted: bool = False

    @classmethod
    def make(
        cls, max_model_len: int, max_num_seqs: int, data: int, fitted: bool = False
    ) -> "Buckets":
        rows = [1]
        while rows[-1] * data < max_num_seqs:
            rows.append(min(rows[-1] * 2, -(-max_num_seqs // data)))
        batch = tuple(r * data for r in rows)
        chunks = (SHORT,) * fitted + chunks_within(max_model_len)
        return cls(positions(max_model_len), batch, chunks, fitted)

    @property
    def contexts(self) -> tuple[int, ...]:
        """The lengths caches have, in whole chunks: the context, a quarter of it, and so on."""
        found = [self.context]
        while LEAST <= (shorter := positions(-(-found[0] // SHORTER))) < found[0]:
            found.insert(0, shorter)
        return tuple(found)

    def context_for(self, tokens: int) -> int:
        """The shortest cache for a sequence that will have so many tokens, ``max_model_len`` at
        most."""
        return next(length for length in self.contexts if length >= tokens)

    def batch_for(self, sequences: int) -> int:
        """The smallest decode bucket for this many sequences; the largest if none is enough."""
        return next((b for b in self.batch if b >= sequences), self.batch[-1])

    def chunk_sizes(self, tokens: int) -> list[int]:
        """How a prompt of this length is cut: largest chunks, then what holds the rest: one chunk,
        or, where they are `fitted`, smaller ones if those take less."""
        whole, rest = divmod(tokens, self.chunks[-1])
        return [self.chunks[-1]] * whole + self._cut(rest)

    def _cut(self, rest: int) -> list[int]:
        if rest <= 0:
            return []
        smaller, size = next(p for p in pairwise((0, *self.chunks)) if p[1] >= rest)
        if not (self.fitted and smaller):
            return [size]
        return min([size], [smaller, *self._cut(rest - smaller)], key=_takes)


def _takes(sizes: list[int]) -> int:
    """What calls of these sizes take on a CPU, in the time of a token (BENCHMARKS.md, "Start")."""
    return sum(sizes) + CALL * len(sizes)


def chunks_within(context: int) -> tuple[int, ...]:
    """The chunks no longer than the context; the shortest, if none is."""
    return tuple(c for c in CHUNKS if c <= context) or CHUNKS[:1]


def positions(context: int) -> int:
    """Cache positions for this many tokens: whole chunks of the largest size."""
    chunk = chunks_within(context)[-1]
    return -(-context // chunk) * chunk


def at_a_time(positions: int) -> int:
    """Of how many cache positions there are scores at the same time, where blocks are used."""
    return BLOCK if positions > 2 * BLOCK and positions % BLOCK == 0 else positions
