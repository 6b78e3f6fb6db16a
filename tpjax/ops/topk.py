"""Choosing tokens from logits that stay split over the vocabulary.

Each function here is the inside of one island: it sees the local slice of the logits and talks to
the other slices through `Shards`. What travels is a few numbers per sequence, never the logits.

B sequences, V local vocabulary slice, C candidates, W slices.
"""

import dataclasses

import jax
import jax.numpy as jnp

CANDIDATES = 64  # per slice; most nuclei and every usual top_k end well within them


@dataclasses.dataclass(frozen=True)
class Shards:
    """The mesh axes the vocabulary is split over, and how to hear from every slice."""

    axes: tuple[str, ...]

    def first_id(self, size: int) -> jax.Array:
        """Token id of the first entry of the local slice."""
        return jax.lax.axis_index(self.axes) * size if self.axes else jnp.int32(0)

    def gather(self, x: jax.Array) -> jax.Array:
        """``[W, ...]``: everyone's ``x``, in the order of their token ids."""
        return jax.lax.all_gather(x, self.axes) if self.axes else x[None]

    def gather_pairs(self, score: jax.Array, id_: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores and ids of every slice in one message, as ``[B, W * C]`` in order of slices."""
        both = jnp.stack([jax.lax.bitcast_convert_type(score, jnp.int32), id_])
        both = self.gather(both)  # [W, 2, B, C]
        flat = jnp.transpose(both, (1, 2, 0, 3)).reshape(2, score.shape[0], -1)
        return jax.lax.bitcast_convert_type(flat[0], jnp.float32), flat[1]


def greedy(logits_BV: jax.Array, shards: Shards) -> tuple[jax.Array, jax.Array]:
    """Id and value of the largest logit; ties go to the lowest id. One all-gather of 2 B W."""
    at = jnp.argmax(logits_BV, axis=-1)  # the first of equals
    value = jnp.take_along_axis(logits_BV, at[:, None], axis=-1)
    id_ = at[:, None].astype(jnp.int32) + shards.first_id(logits_BV.shape[1])
    value, id_ = shards.gather_pairs(value, id_)
    best = jnp.argmax(value, axis=-1)[:, None]
    pick = lambda x: jnp.take_along_axis(x, best, axis=-1)[:, 0]  # noqa: E731
    return pick(id_), pick(value)


def log_sum_exp(logits_BV: jax.Array, shards: Shards) -> tuple[jax.Array, jax.Array]:
    """Largest logit and log of the summed exponentials, ``[B]`` each, over all slices. One
    all-gather of 2 B W numbers."""
    lowest = jnp.finfo(jnp.float32).min  # a slice of nothing but padding has no finite logit
    top = jnp.maximum(jnp.max(logits_BV, axis=-1), lowest)
    mass = jnp.sum(jnp.exp(logits_BV - top[:, None]), axis=-1)
    tops, masses = jnp.moveaxis(shards.gather(jnp.stack([top, mass])), 1, 0)  # [W, B] each
    top = jnp.max(tops, axis=0)
    return top, top + jnp.log(jnp.sum(masses * jnp.exp(tops - top[None]), axis=0))


def candidates(
    logits_BV: jax.Array, shards: Shards, count: int = CANDIDATES
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best ``count`` of every slice: values and ids ``[B, W C]``, largest first and lowest id
    first among equals, and ``bound_B``: every token above it is among them."""
    size = logits_BV.shape[1]
    value, at = jax.lax.top_k(logits_BV, min(count, size))
    id_ = at.astype(jnp.int32) + shards.first_id(size)
    value, id_ = shards.gather_pairs(value, id_)
    if count < size:
        bound = jnp.max(value.reshape(value.shape[0], -1, count)[:, :, -1], axis=-1)
    else:
        bound = jnp.full(value.shape[:1], -jnp.inf)
    negated, id_ = jax.lax.sort((-value, id_), dimension=-1, num_keys=2)
    return -negated, id_, bound


def candidate_threshold(
    value_BC: jax.Array,
    bound_B: jax.Array,
    top_B: jax.Array,
    lse_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The logit a token needs to be drawn, and whether the candidates suffice to know it.

    The filters are those of transformers, in its order: top_k keeps the k largest, top_p the
    smallest set of what is left whose share reaches p, min_p what has at least that share of the
    likeliest token's probability. Each is a threshold on the logit, so equals are kept together.
    """
    C = value_BC.shape[1]
    mass_BC = jnp.exp(value_BC - lse_B[:, None])
    rank_C = jnp.arange(C)[None, :]

    wants_k = top_k_B > 0
    k = jnp.clip(top_k_B, 1, C)[:, None]
    kth = jnp.take_along_axis(value_BC, k - 1, axis=-1)[:, 0]
    tau_k = jnp.where(wants_k, kth, -jnp.inf)
    sure_k = ~wants_k | ((top_k_B <= C) & (kth > bound_B)) | (bound_B == -jnp.inf)

    kept_BC = value_BC >= tau_k[:, None]
    mass_BC = jnp.where(kept_BC, mass_BC, 0.0)
    goal = top_p_B * jnp.where(wants_k, jnp.sum(mass_BC, axis=-1), 1.0)
    before_BC = jnp.cumsum(mass_BC, axis=-1) - mass_BC
    wants_p = top_p_B < 1.0
    in_nucleus = (before_BC < goal[:, None]) & kept_BC
    last = jnp.max(jnp.where(in_nucleus, rank_C, 0), axis=-1)[:, None]
    edge = jnp.take_along_axis(value_BC, last, axis=-1)[:, 0]
    reached = jnp.sum(jnp.where(value_BC >= edge[:, None], mass_BC, 0.0), axis=-1) >= goal
    tau_p = jnp.where(wants_p, edge, -jnp.inf)
    sure_p = ~wants_p | ((edge > bound_B) & reached) | (bound_B == -jnp.inf)

    tau_m = top_B + jnp.log(min_p_B)  # log 0 is -inf: no filter
    tau = jnp.maximum(jnp.maximum(tau_k, tau_p), tau_m)
    return tau, sure_k & sure_p & (tau > bound_B) | (bound_B == -jnp.inf)


def exact_threshold(
    logits_BV: jax.Array,
    shards: Shards,
    top_B: jax.Array,
    lse_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array,
) -> jax.Array:
    """The same threshold whatever the candidates hold: a binary search over the 2**32 float32
    values, with one small all-gather per bit. Slow (64 rounds) and rarely needed."""
    share_BV = jnp.exp(logits_BV - lse_B[:, None])

    def above(limit_B):
        """How many tokens, and how much probability, lie strictly above ``limit``."""
        over = logits_BV > limit_B[:, None]
        local = jnp.stack(
            [jnp.sum(over, axis=-1).astype(jnp.float32), jnp.sum(share_BV, axis=-1, where=over)]
        )
        return jnp.sum(shards.gather(local), axis=0)

    def lowest(holds):
        """The smallest float32 for which ``holds`` is true; it is false below and true above."""

        def narrow(_, bounds):
            low, high = bounds  # holds(high), not holds(low), as ordered integers
            middle = (low & high) + ((low ^ high) >> 1)
            ok = holds(_from_ordered(middle))
            return jnp.where(ok, low, middle), jnp.where(ok, middle, high)

        low = jnp.full(top_B.shape, _to_ordered(jnp.float32(-jnp.inf)))
        _, high = jax.lax.fori_loop(0, 32, narrow, (low, _to_ordered(top_B)))
        return _from_ordered(high)

    wants_k, wants_p = top_k_B > 0, top_p_B < 1.0
    tau_k = lowest(lambda limit: above(limit)[0] < top_k_B.astype(jnp.float32))
    tau_k = jnp.where(wants_k, tau_k, -jnp.inf)
    left = jnp.sum(share_BV, axis=-1, where=logits_BV >= tau_k[:, None])
    goal = top_p_B * jnp.where(wants_k, jnp.sum(shards.gather(left), axis=0), 1.0)
    tau_p = lowest(lambda limit: above(jnp.maximum(limit, _below(tau_k)))[1] < goal)
    tau_p = jnp.where(wants_p, tau_p, -jnp.inf)
    return jnp.maximum(jnp.maximum(tau_k, tau_p), top_B + jnp.log(min_p_B))


def gumbel(key_B: jax.Array, id_BC: jax.Array) -> jax.Array:
    """Standard Gumbel noise that belongs to a (key, token id) pair: how the vocabulary is split, or
    which tokens are asked about, changes nothing."""
    keys = jax.vmap(lambda key, ids: jax.vmap(lambda i: jax.random.fold_in(key, i))(ids))(
        key_B, id_BC
    )
    bits = jax.random.key_data(keys)[..., 0]
    return -jnp.log(-jnp.log(uniform(bits)))


def uniform(bits: jax.Array) -> jax.Array:
    """Random uint32 as float32 strictly between 0 and 1: 23 bits, because with 24 the half that is
    added would round the largest up to 1, and its noise would be infinite."""
    return ((bits >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)


def draw_from_candidates(value_BC, id_BC, tau_B, key_B) -> jax.Array:
    """One token of the softmax of what reaches ``tau``: the largest logit plus noise."""
    noisy = jnp.where(value_BC >= tau_B[:, None], value_BC + gumbel(key_B, id_BC), -jnp.inf)
    at = jnp.argmax(noisy, axis=-1)[:, None]
    return jnp.take_along_axis(id_BC, at, axis=-1)[:, 0]


def draw_from_all(logits_BV, shards: Shards, tau_B, key_B) -> jax.Array:
    """The same draw over the whole vocabulary: each slice its own best, then the best of these."""
    size = logits_BV.shape[1]
    id_BV = jnp.broadcast_to(shards.first_id(size) + jnp.arange(size)[None, :], logits_BV.shape)
    noisy = jnp.where(logits_BV >= tau_B[:, None], logits_BV + gumbel(key_B, id_BV), -jnp.inf)
    return greedy(noisy, shards)[0]


def _to_ordered(x: jax.Array) -> jax.Array:
    """Float32 as int32 that compare the same way."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _from_ordered(i: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.where(i < 0, i ^ jnp.int32(0x7FFFFFFF), i), jnp.float32)


def _below(x: jax.Array) -> jax.Array:
    """The next smaller float32; -inf stays."""
    return jnp.where(x == -jnp.inf, x, _from_ordered(_to_ordered(x) - 1))
