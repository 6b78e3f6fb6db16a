"""The sampler, on logits split over a mesh: filters are transformers', draws follow the softmax,
and a row's token depends on its seed and position only."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tpjax import sampling
from tpjax.ops import topk
from tpjax.ops.sample import NOT_A_NUMBER, sample
from tpjax.parallel.mesh import make_mesh
from tpjax.params import MAX_LOGPROBS, Row, SamplingParams
from tpjax.plan import Plan

VOCAB = 1003  # not a multiple of anything, and several times the candidates of one slice
ROWS = 8
MESHES = {"1": (1, 1, 1), "4": (1, 4, 1), "2x4": (2, 4, 1), "4x2 rep": (1, 4, 2), "8": (1, 8, 1)}


@functools.cache
def sampler(mesh: str, vocab: int = VOCAB):
    """Logits ``[ROWS, vocab]`` and rows in; a Drawn out. Padding gets the largest logits."""
    plan = Plan(mesh=make_mesh(*MESHES[mesh]))
    padding = plan.dim("vocab", vocab).size - vocab
    with jax.set_mesh(plan.mesh):
        step = jax.jit(lambda logits, packed: sample(plan, vocab, logits, sampling.unpack(packed)))

    def run(logits: np.ndarray, rows: list[Row | None]):
        padded = np.pad(logits, ((0, 0), (0, padding)), constant_values=1e4).astype(np.float32)
        with jax.set_mesh(plan.mesh):
            args = (
                jax.device_put(padded, plan.sharding("batch", "vocab")),
                jax.device_put(sampling.pack(rows), plan.sharding(None, None)),
            )
            return jax.device_get(step(*args))

    return run


def row(position: int = 5, seed: int = 1, **words) -> Row:
    return Row(0, position, 9, seed, SamplingParams(**words), ())


def random_logits(seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (ROWS, VOCAB)).astype(np.float32)


def kept_by_transformers(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    scores, ids = torch.tensor(logits)[None], torch.zeros((1, 1), dtype=torch.long)
    scores = TemperatureLogitsWarper(p.temperature)(ids, scores)
    if p.top_k > 0:
        scores = TopKLogitsWarper(p.top_k)(ids, scores)
    if p.top_p < 1:
        scores = TopPLogitsWarper(p.top_p)(ids, scores)
    if p.min_p > 0:
        scores = MinPLogitsWarper(p.min_p)(ids, scores)
    return np.isfinite(scores[0].numpy())


@pytest.mark.parametrize("mesh", MESHES)
def test_greedy_takes_the_largest_and_of_equals_the_lowest_id(mesh):
    logits = random_logits()
    logits[1, [700, 3, 999]] = 50.0
    logits[2, [1002, 501]] = 50.0
    tokens = sampler(mesh)(logits, [row(temperature=0.0)] * ROWS).token_B
    assert tokens.tolist() == np.argmax(logits, axis=-1).tolist()
    assert tokens[1] == 3 and tokens[2] == 501


@pytest.mark.parametrize("mesh", MESHES)
def test_padding_is_never_drawn(mesh):
    """Padded entries have by far the largest logits here."""
    for words in ({"temperature": 0.0}, {"temperature": 5.0}, {"temperature": 5.0, "top_k": 900}):
        for seed in range(3):
            tokens = sampler(mesh)(
                random_logits(scale=0.01), [row(seed=seed, **words)] * ROWS
            ).token_B
            assert (tokens >= 0).all() and (tokens < VOCAB).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0.05, 8.0),
    st.sampled_from([0, 1, 5, 63, 64, 65, 200, 1003, 5000]),
    st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    st.booleans(),
)
def test_both_thresholds_keep_what_transformers_keeps(seed, scale, top_k, top_p, min_p, ties):
    """The exact search always, and the candidates whenever they claim to be sure."""
    logits = random_logits(seed, scale)[:1]
    if ties:
        logits = np.round(logits * 2) / 2
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    wanted = kept_by_transformers(logits[0], params)
    exact, sure_tau, sure = (float(x[0]) for x in thresholds(logits, top_k, top_p, min_p))
    for tau in [exact] + [sure_tau] * bool(sure):
        differ = (logits[0] >= tau) != wanted
        if differ.any():
            # Equals at the edge of a nucleus: transformers keeps those that its sort puts first,
            # we keep them all. And cumulative sums in another order may move an exact tie.
            edge = logits[0][differ]
            equals = ties and len(set(edge)) == 1 and (logits[0] == edge[0])[wanted].any()
            assert equals or edge_share(logits[0], edge, top_p) < 2e-5


def edge_share(logits: np.ndarray, edge: np.ndarray, top_p: float) -> float:
    """How far the mass above the disputed tokens is from ``top_p``, at the closest."""
    share = np.exp(logits.astype(np.float64) - logits.max())
    share /= share.sum()
    above = [share[logits > e].sum() for e in edge] + [share[logits >= e].sum() for e in edge]
    return min(abs(a - top_p) for a in above)


@functools.cache
def _thresholds():
    one = topk.Shards(())

    def both(logits, k, p, m):
        top, lse = topk.log_sum_exp(logits, one)
        value, _, bound = topk.candidates(logits, one)
        tau, sure = topk.candidate_threshold(value, bound, top, lse, k, p, m)
        return topk.exact_threshold(logits, one, top, lse, k, p, m), tau, sure

    return jax.jit(both)


def thresholds(logits, top_k, top_p, min_p):
    words = [np.array([x], t) for x, t in ((top_k, "i4"), (top_p, "f4"), (min_p, "f4"))]
    return _thresholds()(jnp.asarray(logits), *words)


def test_candidates_are_sure_in_the_usual_case():
    """Otherwise the fast path would be correct and never taken."""
    logits = random_logits(3)[:1]
    for words in ((50, 1.0, 0.0), (0, 0.5, 0.0), (40, 0.95, 0.05), (0, 1.0, 0.2)):
        assert bool(thresholds(logits, *words)[2][0]), words


CASES = [
    dict(temperature=1.0),
    dict(temperature=0.7, top_k=50, top_p=0.95),
    dict(temperature=1.5, top_p=0.99),
    dict(temperature=1.0, top_k=300),
    dict(temperature=2.0, min_p=0.001),
    dict(temperature=0.0),
    dict(temperature=1.0, top_k=1),
    dict(temperature=0.3, logprobs=3),
]


def test_a_row_is_the_same_on_every_mesh_and_beside_any_other():
    """Every kind of request, each alone (the others empty) and all together, on all meshes."""
    logits = random_logits(7, 1.0)
    rows = [row(position=i, seed=10 + i, **words) for i, words in enumerate(CASES)]
    together = {mesh: sampler(mesh)(logits, rows).token_B.tolist() for mesh in MESHES}
    assert len({tuple(tokens) for tokens in together.values()}) == 1, together
    for i in range(ROWS):
        alone = [r if i == j else None for j, r in enumerate(rows)]
        for mesh in ("1", "2x4"):
            assert sampler(mesh)(logits, alone).token_B[i] == together["1"][i]


def test_position_and_seed_change_the_draw_and_nothing_else_does():
    logits = np.repeat(random_logits(scale=0.1)[:1], ROWS, axis=0)
    run = sampler("4")
    first = run(logits, [row(position=i, seed=1, temperature=1.0) for i in range(ROWS)]).token_B
    other = run(logits, [row(position=3, seed=i, temperature=1.0) for i in range(ROWS)]).token_B
    same = run(logits, [row(position=2, seed=2**40 + 1, temperature=1.0)] * ROWS).token_B
    assert len(set(first.tolist())) > 4 and len(set(other.tolist())) > 4
    assert len(set(same.tolist())) == 1
    low_word_only = run(logits, [row(position=2, seed=1, temperature=1.0)] * ROWS).token_B
    assert same[0] != low_word_only[0]


@pytest.mark.parametrize("words", [dict(temperature=0.8), dict(temperature=0.8, top_k=6)])
def test_draws_follow_the_softmax(words):
    """4,000 draws against the probabilities; the limit is a chi-square test at one in 10,000."""
    logits = np.full((ROWS, VOCAB), -30.0, np.float32)
    logits[:, [3, 400, 401, 700, 900, 1002, 5, 6]] = [2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5]
    kept = kept_by_transformers(logits[0], SamplingParams(**words))
    p = np.where(kept, np.exp(logits[0] / words["temperature"]), 0)
    p /= p.sum()
    run, counts = sampler("4"), np.zeros(VOCAB)
    for start in range(0, 4000, ROWS):
        tokens = run(
            logits, [row(position=start + i, seed=77, **words) for i in range(ROWS)]
        ).token_B
        np.add.at(counts, tokens, 1)
    seen = p > 1e-4
    assert counts[~seen].sum() == 0
    chi2 = ((counts[seen] - 4000 * p[seen]) ** 2 / (4000 * p[seen])).sum()
    assert chi2 < {8: 29.9, 6: 25.7}[int(seen.sum())]


@pytest.mark.parametrize("mesh", ["1", "4", "2x4"])
def test_logprobs_are_the_log_softmax_of_the_raw_logits(mesh):
    logits = random_logits(5)
    drawn = sampler(mesh)(logits, [row(seed=i, temperature=0.5, logprobs=5) for i in range(ROWS)])
    wanted = torch.log_softmax(torch.tensor(logits), -1).numpy()
    order = np.argsort(-wanted, axis=-1, kind="stable")[:, :MAX_LOGPROBS]
    chosen = wanted[np.arange(ROWS), drawn.token_B]
    np.testing.assert_allclose(drawn.logprob_B, chosen, atol=1e-5)
    assert (drawn.top_id_BN == order).all()
    np.testing.assert_allclose(
        drawn.top_logprob_BN, np.take_along_axis(wanted, order, -1), atol=1e-5
    )


def test_a_vocabulary_smaller_than_the_logprobs_list():
    drawn = sampler("4", 13)(random_logits()[:, :13], [row(temperature=0.0, logprobs=20)] * ROWS)
    assert (np.sort(drawn.top_id_BN[:, :13], -1) == np.arange(13)).all()
    assert (drawn.top_id_BN[:, 13:] == -1).all()
    assert (drawn.token_B < 13).all()


def test_noise_is_finite_for_every_bit_pattern():
    """One infinite draw in 2**24 would make one token in a hundred random at a usual vocabulary."""
    bits = jnp.asarray([0, 1, 2**9, 2**31, 2**32 - 512, 2**32 - 1], jnp.uint32)
    uniform = np.asarray(topk.uniform(bits))
    assert (0 < uniform).all() and (uniform < 1).all()
    assert np.isfinite(-np.log(-np.log(uniform))).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_not_a_number_is_reported_not_drawn(wrong):
    logits = random_logits()
    logits[3, 500] = wrong
    tokens = sampler("4")(logits, [row(temperature=t) for t in itertools.repeat(1.0, ROWS)]).token_B
    assert tokens[3] == NOT_A_NUMBER and (np.delete(tokens, 3) >= 0).all()


def test_pack_and_unpack_are_inverse():
    params = SamplingParams(temperature=0.3, top_k=7, top_p=0.9, min_p=0.2, logprobs=4)
    packed = sampling.pack([Row(5, 6, 7, 2**63 + 3, params, (11, 12)), None])
    rows = jax.device_get(jax.jit(sampling.unpack)(packed))
    assert rows.seed_B2[0].tolist() == [2**31, 3]
    assert rows.temperature_B[0] == np.float32(0.3) and rows.top_p_B.tolist() == [
        np.float32(0.9),
        1,
    ]
    assert rows.stop_BE[0, :3].tolist() == [11, 12, -1] and rows.logprobs_B.tolist() == [4, -1]
    assert rows.remaining_B.tolist() == [7, 0]
