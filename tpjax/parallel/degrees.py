"""How a model's heads are spread over any number of devices, and which degrees need no padding.
Numbers only: no jax.

Axes: ``data`` (replicas of the model that share the batch), ``expert`` (whole experts are placed
over it; everything else is split over it as over ``tensor``), ``tensor`` (heads, MLP width and
vocabulary are split over it) and ``rep``: devices that share a key/value head, while query heads,
MLP and vocabulary are split over all of them.
"""

import math
from dataclasses import dataclass

from tpjax.config import ModelConfig
from tpjax.errors import UsageError
from tpjax.parallel.dims import MeshAxes, place_heads

AXES = ("data", "expert", "tensor", "rep")


def words(sizes) -> str:
    """``data=1 x tensor=4 x rep=2``; ``expert`` only where it is used."""
    return " x ".join(f"{a}={sizes[a]}" for a in AXES if a != "expert" or sizes[a] > 1)


@dataclass(frozen=True)
class Spread:
    """How the devices of one replica hold the heads: ``kv`` mesh axes split key/value heads, the
    devices along ``copies`` share one and split its query heads."""

    tensor: int
    rep: int
    kv: MeshAxes
    copies: MeshAxes


def spread(config: ModelConfig, expert: int, tensor: int, rep: int) -> Spread:
    """The best of the ways to hold the heads on this many devices: that with the fewest heads on
    each, where key/value heads count twice, for their projections and for the cache. With ``rep``
    given, it stays; else ``tensor`` may be split into ``tensor`` x ``rep``."""
    degree = tensor * rep

    def ways():
        for t in (tensor,) if rep > 1 else (d for d in range(1, degree + 1) if degree % d == 0):
            yield Spread(t, degree // t, ("expert", "tensor"), ("rep",)), expert * t
            if expert > 1:
                yield Spread(t, degree // t, ("tensor",), ("rep", "expert")), t

    def cost(way: tuple[Spread, int]):
        kv = -(-config.kv_heads // way[1])
        copies = expert * degree // way[1]
        queries = kv * -(-(config.heads // config.kv_heads) // copies)
        return queries + 2 * kv, kv, copies

    return min(ways(), key=cost)[0]


def refusal(config: ModelConfig, expert: int, tensor: int, rep: int) -> str | None:
    """Why these axes make no sense for this model, or None if they do."""
    if expert > 1 and config.moe is None:
        return f"expert={expert}: {config.family} has no experts; use tensor"
    if config.moe is not None and expert > config.moe.experts:
        return f"expert={expert} is more than the {config.moe.experts} experts"
    degree = expert * tensor * rep
    if degree > config.heads:
        return f"{degree} devices are more than heads={config.heads}"
    return None


def fitted(config: ModelConfig, expert: int, tensor: int, rep: int) -> Spread:
    """The best way to hold the heads. Raises UsageError for axes that make no sense, with the
    nearest ones that do."""
    if why := refusal(config, expert, tensor, rep):
        raise UsageError(f"{why}: {nearest(config, expert, expert * tensor * rep)}")
    return spread(config, expert, tensor, rep)


def even_degrees(config: ModelConfig, expert: int = 1) -> list[int]:
    """The tensor degrees at which nothing is padded but the vocabulary, smallest first, with whole
    experts on ``expert`` devices."""
    return [d for d in range(1, config.heads // expert + 1) if _even(config, expert, d)]


def _even(config: ModelConfig, expert: int, degree: int) -> bool:
    best, moe = spread(config, expert, degree, 1), config.moe
    sizes = {"expert": expert, "tensor": best.tensor, "rep": best.rep}
    shards, copies = (math.prod(sizes[a] for a in axes) for axes in (best.kv, best.copies))
    heads = place_heads(config.heads, config.kv_heads, shards, copies)
    split = []  # (a width, into how many)
    if not all(map(config.is_sparse, range(config.layers))):
        split.append((config.mlp, expert * degree))
    if moe is not None:
        split += [(moe.mlp, degree), (moe.shared_mlp, expert * degree), (moe.experts, expert)]
    return -1 not in heads.queries + heads.kv and not any(width % n for width, n in split)


def nearest(config: ModelConfig, expert: int, degree: int) -> str:
    """The nearest to ``degree`` devices, in all, that works, as something one can type."""
    most = config.moe.experts if config.moe else 1
    expert = min(expert, most, config.heads)
    tensor = max(1, min(config.heads, degree) // expert)
    if expert == 1:
        return f"the nearest tensor degree that works is {tensor}"
    return f"the nearest that works is expert={expert} x tensor={tensor}"
