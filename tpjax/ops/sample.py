"""The island that draws the next tokens from logits split over the vocabulary.

B sequences, V vocabulary, E stop ids, N tokens asked for in logprobs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tpjax.ops import topk
from tpjax.params import MAX_LOGPROBS
from tpjax.plan import Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The same for every sequence of a batch, on the device. Replicated: a few dozen bytes each."""

    token_B: jax.Array
    position_B: jax.Array
    remaining_B: jax.Array  # 0: finished, or no sequence here
    seed_B2: jax.Array  # uint32: high and low word
    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    logprobs_B: jax.Array  # -1: none
    stop_BE: jax.Array  # padded with -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """One new token per sequence; -2 where the largest logit was NaN or infinite. Logprobs are of
    the raw logits: the chosen token's, and the likeliest tokens' with their ids."""

    token_B: jax.Array
    logprob_B: jax.Array
    top_id_BN: jax.Array
    top_logprob_BN: jax.Array


NOT_A_NUMBER = -2


def on_all(plan: Plan, rows: Rows) -> Rows:
    """The same rows, held by every device: in a loop XLA would leave each replica its own, as they
    are first used there, and gather them for whatever comes next."""
    every = plan.spec()
    same = jax.shard_map(
        lambda rows: rows, mesh=plan.mesh, in_specs=every, out_specs=every, check_vma=False
    )
    return same(rows)


def sample(plan: Plan, vocab: int, logits_BV: jax.Array, rows: Rows) -> Drawn:
    """Draw every sequence's next token from logits split over the vocabulary.

    The random stream is Gumbel noise from (request seed, position of the new token, token id), so a
    request's tokens do not depend on the mesh, on its row, or on the other rows. What is sent: see
    `collectives`.
    """
    axes = plan.mesh_axes("vocab")
    data_axes = plan.mesh_axes("batch")

    def local(logits, rows):
        shards = topk.Shards(axes)
        size = logits.shape[1]
        id_V = shards.first_id(size) + jnp.arange(size)
        logits = jnp.where(id_V[None, :] < vocab, logits, -jnp.inf)
        greedy, best = topk.greedy(logits, shards)
        token = jax.lax.cond(
            _any(rows.temperature_B > 0, data_axes),
            lambda: jnp.where(
                rows.temperature_B > 0, _draw(logits, shards, rows, data_axes), greedy
            ),
            lambda: greedy,
        )
        nothing = (
            jnp.zeros(token.shape, jnp.float32),
            jnp.zeros((*token.shape, MAX_LOGPROBS), jnp.int32),
            jnp.zeros((*token.shape, MAX_LOGPROBS), jnp.float32),
        )
        logprobs = jax.lax.cond(
            _any(rows.logprobs_B >= 0, data_axes),
            lambda: _logprobs(logits, shards, token),
            lambda: nothing,
        )
        token = jnp.where(jnp.isfinite(best), token, NOT_A_NUMBER)
        drawn = Drawn(token, *logprobs)
        if plan.data == 1:
            return drawn
        return jax.tree.map(lambda x: jax.lax.all_gather(x, data_axes, tiled=True), drawn)

    everywhere = plan.spec(None)
    row_spec = jax.tree.map(lambda x: plan.spec("batch", *(None,) * (x.ndim - 1)), rows)
    return jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(plan.spec("batch", "vocab"), row_spec),
        out_specs=everywhere,
        check_vma=False,
    )(logits_BV, jax.tree.map(jax.reshard, rows, row_spec))


def _any(flag_B: jax.Array, data_axes) -> jax.Array:
    """Whether it holds for any sequence of any replica: a branch that communicates must be taken
    by all devices or none."""
    flag = jnp.any(flag_B)
    return jnp.any(jax.lax.all_gather(flag, data_axes)) if data_axes else flag


def _draw(logits, shards, rows: Rows, data_axes) -> jax.Array:
    hot_B = rows.temperature_B > 0
    scaled = logits / jnp.where(hot_B, rows.temperature_B, 1.0)[:, None]
    key_B = jax.vmap(
        lambda words, at: jax.random.fold_in(
            jax.random.wrap_key_data(words, impl="threefry2x32"), at
        )
    )(rows.seed_B2, rows.position_B + 1)
    top, lse = topk.log_sum_exp(scaled, shards)
    value, id_, bound = topk.candidates(scaled, shards)
    asked = rows.top_k_B, rows.top_p_B, rows.min_p_B
    tau, sure = topk.candidate_threshold(value, bound, top, lse, *asked)
    filtered = (rows.top_k_B > 0) | (rows.top_p_B < 1.0)
    unsure = hot_B & ~sure

    def from_all():
        # A row that is sure keeps its threshold, so that no neighbour can change what it draws.
        exact = jax.lax.cond(
            _any(unsure & filtered, data_axes),
            lambda: topk.exact_threshold(scaled, shards, top, lse, *asked),
            lambda: top + jnp.log(rows.min_p_B),
        )
        limit = jnp.where(sure, tau, exact)
        return topk.draw_from_all(scaled, shards, limit, key_B)

    return jax.lax.cond(
        _any(unsure, data_axes),
        from_all,
        lambda: topk.draw_from_candidates(value, id_, tau, key_B),
    )


def _logprobs(logits, shards, token_B):
    _, lse = topk.log_sum_exp(logits, shards)
    value, id_, _ = topk.candidates(logits, shards, MAX_LOGPROBS)
    short = MAX_LOGPROBS - value.shape[1]
    if short > 0:  # a vocabulary smaller than the list
        value = jnp.pad(value, ((0, 0), (0, short)), constant_values=-jnp.inf)
        id_ = jnp.pad(id_, ((0, 0), (0, short)))
    id_ = jnp.where(value > -jnp.inf, id_, -1)  # padding
    size = logits.shape[1]
    at = token_B - shards.first_id(size)
    mine = (at >= 0) & (at < size)
    own = jnp.take_along_axis(logits, jnp.where(mine, at, 0)[:, None], axis=-1)[:, 0]
    chosen = jnp.max(shards.gather(jnp.where(mine, own, -jnp.inf)), axis=0)
    top = value[:, :MAX_LOGPROBS] - lse[:, None]
    return chosen - lse, id_[:, :MAX_LOGPROBS], top


def collectives(plan: Plan) -> dict[str, int]:
    """The most collectives the sampler puts into a program's text; the compiler drops those of
    branches that a small vocabulary can never take. A greedy batch executes the first only, a
    sampled one two more, a nucleus wider than the candidates the rest."""
    vocab = {
        "greedy": 1,
        "log-sum-exp and candidates": 2,
        "exact threshold": 3,
        "draw from all": 1,
        "logprobs": 3,
    }
    replicas = {"which branch": 4, "tokens and logprobs": 4}
    split = 1 if plan.shards("vocab") > 1 else 0
    copies = 1 if plan.data > 1 else 0
    return {"all-gather": split * sum(vocab.values()) + copies * sum(replicas.values())}
