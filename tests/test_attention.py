"""Attention by blocks is attention: over long caches, every form of scores, and in whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpjax
from tests import reference
from tpjax.buckets import BLOCK
from tpjax.ops import attention, attention_ref
from tpjax.ops.attention_ref import Scores

RNG = np.random.default_rng(1)
LONG = 4 * BLOCK
FORMS = {
    "plain": Scores(0.3),
    "softcap": Scores(0.3, softcap=5.0),
    "window": Scores(0.3, window=100),  # some queries see nothing of most blocks
}


def some(*shape: int, dtype="float32") -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("filled", [True, False], ids=["filled blocks", "all blocks"])
def test_by_blocks(form, T, filled):
    """Three query heads to a key/value head; sequences of different lengths, at edges of blocks."""
    q, k, v = some(4, T, 6, 8), some(4, 2, LONG, 8), some(4, 2, LONG, 8)
    last = np.array([T - 1, BLOCK - 1, BLOCK, LONG - 1])
    position = jnp.asarray(last[:, None] - np.arange(T)[::-1], jnp.int32)
    want = attention_ref.attend(q, k, v, position, FORMS[form])
    got = attention.attend(filled, q, k, v, position, FORMS[form])
    assert np.abs(got - want).max() < 1e-5
    position = position[:2]  # the shortest two: what is beyond them is not even read
    k, v = (x[:2].at[:, :, BLOCK:].set(jnp.nan) for x in (k, v))
    got = attention.attend(filled, q[:2], k, v, position, FORMS[form])
    assert np.isfinite(got).all() == filled


def test_in_bfloat16():
    """As far from float32 as all scores at once are."""
    q, k, v = some(1, 3, 6, 8), some(1, 2, LONG, 8), some(1, 2, LONG, 8)
    position = jnp.array([[LONG - 3, LONG - 2, LONG - 1]], jnp.int32)
    want = attention_ref.attend(q, k, v, position, FORMS["plain"])
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    usual = attention_ref.attend(*half, position, FORMS["plain"]).astype(jnp.float32)
    got = attention.attend(True, *half, position, FORMS["plain"]).astype(jnp.float32)
    assert np.abs(got - want).max() < 1.5 * np.abs(usual - want).max()


@pytest.mark.parametrize("tensor", [4, pytest.param(1, marks=pytest.mark.extra)])
def test_a_long_prompt(tiny_model, tensor):
    """A prompt of three chunks in a long cache: logits after every token, then greedy tokens."""
    folder, hf = tiny_model(max_position_embeddings=2048, num_hidden_layers=1)
    llm = reference.load(folder, tensor, max_model_len=2048, max_num_seqs=2)
    assert llm.executables.buckets.context > 2 * BLOCK
    ids, wanted = reference.prompt_and_greedy(hf, 1100, 8)
    assert reference.agrees(llm, hf, ids)
    params = tpjax.SamplingParams(temperature=0, max_tokens=8)
    outputs = llm.generate([ids, reference.prompt(5)], params)
    assert outputs[0].outputs[0].token_ids == wanted
    assert outputs[1].outputs[0].token_ids == reference.greedy(hf, reference.prompt(5), 8)


@pytest.mark.parametrize("wrong", ["a block less", "other positions"])
def test_a_mistake_shows(monkeypatch, wrong):
    q, k, v = some(1, 3, 6, 8), some(1, 2, LONG, 8), some(1, 2, LONG, 8)
    position = jnp.array([[LONG - 3, LONG - 2, LONG - 1]], jnp.int32)
    want = attention_ref.attend(q, k, v, position, FORMS["window"])
    blocks, masked = LONG // BLOCK, attention_ref.masked
    if wrong == "a block less":
        blocks -= 1
    else:
        monkeypatch.setattr(attention, "masked", lambda q, k, at, n, s: masked(q, k, at, n + 1, s))
    got = attention.attend_by_blocks(q, k, v, position, FORMS["window"], blocks)
    assert not np.abs(got - want).max() < 1e-3
