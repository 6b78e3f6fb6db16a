"""Caches are as long as their requests need: the same tokens, in less memory, and nothing compiled
after warm-up."""

import gc
import itertools

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tpjax
from tests.test_generate import tokens
from tpjax import SamplingParams, buckets
from tpjax.buckets import Buckets, positions
from tpjax.cache import KVCache
from tpjax.engine.memory import check_memory, temporary_bytes
from tpjax.executables import Executables, compiles

QUIET = {"say": lambda line: None}
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@given(st.integers(2, 200_000), st.booleans(), st.data())
def test_contexts_hold_every_request(max_model_len, fitted, draw):
    made = Buckets.make(max_model_len, 1, 1, fitted)
    lengths = made.contexts
    assert lengths[-1] == made.context and list(lengths) == sorted(set(lengths))
    for shorter, longer in zip(lengths, lengths[1:], strict=False):
        assert shorter == positions(-(-longer // 4)) >= 1024
        assert made.context_for(shorter) == shorter and made.context_for(shorter + 1) == longer
    total = draw.draw(st.integers(2, max_model_len))
    context = made.context_for(total)
    assert context in lengths and context < max(4 * total + 2048, 4 * 1024 + 2048)
    prompt = draw.draw(st.integers(1, total))
    assert total <= context and sum(made.chunk_sizes(prompt)) <= context


def test_warm_up_builds_what_any_requests_need(folder):
    """Whatever mixture of lengths: every name of theirs is one of all."""
    exe = tpjax.LLM(folder, 1, max_num_seqs=5, max_model_len=64, **QUIET).executables
    for context in (1024, 8192, 40_000):
        exe.buckets = Buckets.make(context, 5, 1)
        every, contexts = set(exe.all_names()), exe.buckets.contexts
        for count in (1, 2, 3, 5, 9):
            for of in itertools.combinations_with_replacement(contexts, min(count, 3)):
                asked = [((s // 2, s - 1), s) for s in (*of, *of[:1] * (count - len(of)))]
                assert set(exe.for_requests(asked)) <= every


@pytest.fixture
def small(monkeypatch):
    """Contexts of 64 and 256 positions where `max_model_len` is 256."""
    monkeypatch.setattr(buckets, "CHUNKS", (32,))
    monkeypatch.setattr(buckets, "LEAST", 64)
    assert Buckets.make(256, 1, 1).contexts == (64, 256)


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model(max_position_embeddings=256)[0]


@pytest.fixture
def ran(monkeypatch):
    """The names of what has run, in order."""
    names = []
    get = Executables.__getitem__
    monkeypatch.setattr(
        Executables, "__getitem__", lambda exe, name: [names.append(name), get(exe, name)][1]
    )
    return names


def model(folder, **words):
    return tpjax.LLM(folder, max_model_len=256, dtype="float32", **QUIET, **words)


# Prompts of so many tokens, and how many are made: contexts of 64, 256, 64, 64, 64, 256.
ASKED = [(5, 9), (70, 150), (20, 30), (60, 4), (30, 2), (3, 240)]


def requests(vocab: int):
    prompts = [[(7 * n + i) % (vocab - 2) + 2 for i in range(n)] for n, _ in ASKED]
    return prompts, [SamplingParams(**GREEDY, max_tokens=more) for _, more in ASKED]


@pytest.mark.parametrize(
    "sizes, rows",
    [
        ({"tensor_parallel_size": 2}, 4),
        ({"tensor_parallel_size": 1}, 1),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, 4),
    ],
)
def test_the_same_tokens_whatever_the_context(small, folder, ran, monkeypatch, sizes, rows):
    """Long and short ones among each other, rows refilled, and each alone."""
    llm = model(folder, max_num_seqs=rows, **sizes)
    prompts, params = requests(llm.config.vocab)
    if rows == 1:
        llm.warm_up()
    before = compiles.count
    together = tokens(llm.generate(prompts, params))
    asked = [(r.prefilled(), r.context) for r in llm._requests(prompts, params)]
    assert set(ran) <= set(llm.executables.for_requests(asked))  # nothing was built on the way
    assert f"decode[b{rows}]" in ran and "prefill[t32,s64]" in ran
    alone = [tokens(llm.generate([p], s))[0] for p, s in zip(prompts, params, strict=True)]
    assert alone == together and [len(t) for t in alone] == [more for _, more in ASKED]
    every = llm.executables.all_names()
    assert set(ran) <= set(every) and set(llm.executables.built) <= set(every)
    assert rows > 1 or compiles.count == before
    monkeypatch.setattr(buckets, "LEAST", 1024)
    whole = model(folder, max_num_seqs=rows, **sizes)
    ran.clear()
    assert tokens(whole.generate(prompts, params)) == together
    assert not any(",s" in name for name in ran)


def test_short_requests_have_short_caches(small, folder, ran):
    llm = model(folder, tensor_parallel_size=2, max_num_seqs=4)
    prompts, params = requests(llm.config.vocab)
    short = [i for i, (n, more) in enumerate(ASKED) if n + more <= 64]
    llm.generate([prompts[i] for i in short], [params[i] for i in short])
    assert "decode[b4,s64]" in ran and all(",s64]" in name for name in ran)
    for name, context in (("decode[b4,s64]", 64), ("insert[b4,s256,s64]", 256)):
        memory = llm.executables.lower(name).compile().memory_analysis()
        held = KVCache.bytes_per_device(llm.config, llm.plan, 4, context)
        assert memory.alias_size_in_bytes == held, name


def test_a_prompt_is_computed_the_same_in_any_company(small, folder, ran, xla_attention):
    """To the last bit, and by the same programs: its cache is as long as it is alone."""
    llm = model(folder, tensor_parallel_size=2, max_num_seqs=4)
    prompts, params = requests(llm.config.vocab)
    params = [SamplingParams(**GREEDY, max_tokens=p.max_tokens, logprobs=5) for p in params]

    def first(outputs):
        return [[(i, p.logprob) for i, p in o.outputs[0].logprobs[0].items()] for o in outputs]

    def prefills():
        return {name for name in ran if name.startswith("prefill")}

    alone = [first(llm.generate([p], s))[0] for p, s in zip(prompts, params, strict=True)]
    programs = prefills()
    ran.clear()
    assert first(llm.generate(prompts, params)) == alone
    assert prefills() == programs


def test_one_row_at_a_time_holds_one_cache(small, folder, monkeypatch):
    """There need not be room for a second, shorter or longer."""
    llm = model(folder, tensor_parallel_size=1, max_num_seqs=1)
    prompts, params = requests(llm.config.vocab)
    llm.warm_up()
    made = []

    def alive() -> int:
        gc.collect()
        return sum(array.ndim == 4 for array in jax.live_arrays())  # keys or values

    zeros = llm._engine._zeros
    before = alive()

    def counted(rows, context):
        made.append(alive() - before)
        return zeros(rows, context)

    monkeypatch.setattr(llm._engine, "_zeros", counted)
    llm.generate(prompts, params)
    assert len(made) == 4 and set(made) == {0}  # for the first, the second, the third, the last


def test_memory_is_of_the_context_that_needs_most(folder):
    """With few layers and many heads the scores of 1,024 positions, taken at once, are more than
    what a cache of 4,096 is larger by."""
    table = tpjax.LLM(folder, 1, max_model_len=256, max_num_seqs=1, dtype="float32", **QUIET).table
    made = Buckets.make(4096, 1, 1)
    memory = check_memory(table, made)
    each = {}
    for context in made.contexts:
        cache = KVCache.bytes_per_device(table.config, table.plan, 1, context)
        each[context] = cache, temporary_bytes(table, made, context)
    assert each[1024][1] > each[4096][1] and sum(each[1024]) > sum(each[4096])
    assert (memory.cache, memory.temporary) == each[1024]


def test_what_is_expected_has_its_context(small, folder, ran):
    for more, name in ((4, "decode[b1,s64]"), (200, "decode[b1]")):
        llm = model(folder, tensor_parallel_size=1, expect=[[5] * 20], expect_tokens=more)
        built = set(llm.executables.built)
        assert name in built
        llm.generate([[5] * 20], SamplingParams(max_tokens=more))
        assert set(llm.executables.built) == built
