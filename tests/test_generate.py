"""Whole requests: the same tokens on every mesh and in any company, stop conditions, streaming, and
no compile after warm-up."""

import dataclasses
import functools

import numpy as np
import pytest

import tpjax
from tpjax import SamplingParams
from tpjax.checkpoint.folder import bundled
from tpjax.engine.request import Detokenizer
from tpjax.errors import UsageError
from tpjax.executables import compiles

KINDS = [
    dict(temperature=0.0),
    dict(temperature=1.0),
    dict(temperature=0.8, top_k=20, top_p=0.9),
    dict(temperature=1.2, min_p=0.05),
    dict(temperature=1.5, top_k=120, top_p=0.999),
]


@pytest.fixture(scope="module")
def llm():
    """The bundled model on four devices, float32, everything built."""
    llm = tpjax.LLM(
        bundled(), 4, dtype="float32", max_model_len=160, max_num_seqs=8, say=lambda line: None
    )
    llm.warm_up()
    return llm


def prompts_and_params(count: int, vocab: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, vocab, rng.integers(1, 90)).tolist() for _ in range(count)]
    params = [
        SamplingParams(seed=100 + i, max_tokens=int(rng.integers(1, 60)), **KINDS[i % len(KINDS)])
        for i in range(count)
    ]
    return prompts, params


def tokens(outputs):
    return [o.outputs[0].token_ids for o in outputs]


@pytest.fixture(scope="module")
def on_one_device(tiny_model):
    """Requests and the tokens one device gives them; once for each number of key/value heads."""
    prompts, params = prompts_and_params(8, 131)

    @functools.cache
    def run(kv_heads):
        folder, _ = tiny_model(num_key_value_heads=kv_heads)
        llm = tpjax.LLM(folder, 1, max_model_len=160, max_num_seqs=4, say=lambda line: None)
        return prompts, params, tokens(llm.generate(prompts, params))

    return run


@pytest.mark.parametrize(
    "data, tensor, kv_heads, split",
    [
        pytest.param(1, 2, 4, (1, 2, 1), marks=pytest.mark.extra),
        pytest.param(1, 4, 4, (1, 4, 1), marks=pytest.mark.extra),
        pytest.param(1, 8, 8, (1, 8, 1), marks=pytest.mark.extra),
        (1, 8, 4, (1, 4, 2)),
        pytest.param(1, 8, 2, (1, 2, 4), marks=pytest.mark.extra),
        (2, 4, 4, (2, 4, 1)),
    ],
)
def test_same_seed_same_tokens_on_every_mesh(
    tiny_model, on_one_device, data, tensor, kv_heads, split
):
    """Greedy and sampled, more requests than rows, so that rows are refilled."""
    prompts, params, wanted = on_one_device(kv_heads)
    folder, _ = tiny_model(num_key_value_heads=kv_heads)
    said = []
    llm = tpjax.LLM(
        folder,
        tensor,
        data_parallel_size=data,
        max_model_len=160,
        max_num_seqs=4,
        say=said.append,
    )
    assert tuple(llm.plan.mesh.shape[a] for a in ("data", "tensor", "rep")) == split
    rep = (
        f"tensor=8 is more than kv_heads={kv_heads}: split into tensor={split[1]} x rep={split[2]}"
    )
    assert said[:1] == ([rep] if split[2] > 1 else [])
    assert any(f"is on {split[2]} devices" in line for line in said) == (split[2] > 1)
    assert tokens(llm.generate(prompts, params)) == wanted
    if data > 1:  # each alone, too: prompts that are prefilled together are cut alike
        alone = [tokens(llm.generate([p], s))[0] for p, s in zip(prompts, params, strict=True)]
        assert alone == wanted


def test_a_request_alone_or_among_seven_others(llm):
    prompts, params = prompts_and_params(8, llm.config.vocab)
    together = tokens(llm.generate(prompts, params))
    alone = [tokens(llm.generate([p], s))[0] for p, s in zip(prompts, params, strict=True)]
    assert together == alone
    assert tokens(llm.generate(prompts[::-1], params[::-1])) == together[::-1]


def test_no_compile_after_warm_up_over_200_requests_of_mixed_lengths(llm):
    prompts, params = prompts_and_params(200, llm.config.vocab, seed=1)
    before = compiles.count
    for start, count in ((0, 1), (1, 2), (3, 5), (8, 92), (100, 100)):
        some = slice(start, start + count)
        for output, asked in zip(
            llm.generate(prompts[some], params[some]), params[some], strict=True
        ):
            completion = output.outputs[0]
            assert 1 <= len(completion.token_ids) <= asked.max_tokens
            ended = completion.finish_reason == "stop"
            assert ended or len(completion.token_ids) == asked.max_tokens
    assert compiles.count == before


def test_one_token_per_dispatch_or_many(llm):
    """Streaming asks for one token at a time, generate for as many as fit: the same text."""
    for words in KINDS:
        params = SamplingParams(seed=3, max_tokens=40, **words)
        whole = llm.generate("JULIET:\nO", params)[0].outputs[0]
        pieces = list(llm.stream("JULIET:\nO", params))
        assert "".join(pieces) == whole.text and len(pieces) > 10
        assert whole.text == llm.tokenizer.decode(whole.token_ids, skip_special_tokens=True)


def test_read_one_by_one_in_any_company(llm):
    """More prompts than rows, of other lengths and kinds, some ended by a stop string that only the
    host knows: the next dispatch is on its way when it is found."""
    prompts, params = prompts_and_params(20, llm.config.vocab, seed=5)
    stops = [
        dataclasses.replace(p, stop=("e",) if i % 3 == 0 else ()) for i, p in enumerate(params)
    ]
    want = tokens(llm.generate(prompts, stops))
    requests = llm._requests(prompts, stops)
    for _ in llm._engine.run(requests, tokens=1):
        pass
    assert [r.output().outputs[0].token_ids for r in requests] == want


def test_devices_do_not_wait_until_the_host_has_read(llm, monkeypatch):
    events, engine = [], llm._engine
    dispatch, read = engine._dispatch, engine._read
    monkeypatch.setattr(
        engine, "_dispatch", lambda *a, **more: [events.append("dispatch"), dispatch(*a, **more)][1]
    )
    monkeypatch.setattr(engine, "_read", lambda landed: [events.append("read"), read(landed)][1])
    list(llm.stream("ROMEO:\n", SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)))
    assert events == ["dispatch", *["dispatch", "read"] * 5]
    events.clear()
    llm.generate("ROMEO:\n", SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    assert events == ["dispatch", "read"]


def test_every_end_of_sequence_id_is_honoured(tiny_model, quiet):
    """Greedy tokens are known; declaring one of them, in a list, ends the text there."""
    folder, hf = tiny_model()
    prompt = list(range(3, 12))
    free = tpjax.LLM(folder, 2, max_model_len=64, max_num_seqs=1, **quiet)
    greedy = SamplingParams(temperature=0.0, max_tokens=40)
    path = tokens(free.generate([prompt], greedy))[0]
    first_seen = {token: path.index(token) for token in path}
    target, at = max(first_seen.items(), key=lambda item: item[1] if item[1] < 30 else -1)

    folder, _ = tiny_model(eos_token_id=[130, target])
    llm = tpjax.LLM(folder, 2, max_model_len=64, max_num_seqs=1, **quiet)
    assert llm.eos_ids == (130, target)
    output = llm.generate([prompt], greedy)[0].outputs[0]
    assert output.token_ids == path[: at + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    ignoring = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    assert tokens(llm.generate([prompt], ignoring))[0] == path

    stop = SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=[target])
    output = free.generate([prompt], stop)[0].outputs[0]
    assert output.token_ids == path[: at + 1] and output.stop_reason == target
    # More ids than the device is told about; the last one counts as well.
    unseen = [i for i in range(131) if i not in path][:10]
    many = SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=[*unseen, target])
    assert tokens(free.generate([prompt], many))[0] == path[: at + 1]


def test_stop_strings_end_the_text_before_them_and_are_never_streamed(llm):
    free = llm.generate("ROMEO:\n", SamplingParams(temperature=0.0, max_tokens=60))[0].outputs[0]
    stop = free.text[25:31]
    params = SamplingParams(temperature=0.0, max_tokens=60, stop=["never in it", stop])
    output = llm.generate("ROMEO:\n", params)[0].outputs[0]
    assert output.text == free.text[: free.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert "".join(llm.stream("ROMEO:\n", params)) == output.text


def test_length_is_capped_by_max_model_len(llm):
    prompt = [5] * 150
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    output = llm.generate([prompt], params)[0].outputs[0]
    assert len(output.token_ids) == 10 and output.finish_reason == "length"


def test_results_have_vllms_names_and_timings(llm):
    output = llm.generate(
        "KING", SamplingParams(max_tokens=5, logprobs=2, seed=1, ignore_eos=True)
    )[0]
    assert output.prompt == "KING" and output.prompt_token_ids[0] == llm.tokenizer.bos_token_id
    completion = output.outputs[0]
    assert completion.index == 0 and len(completion.token_ids) == len(completion.logprobs) == 5
    for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
        assert token in logprobs and 2 <= len(logprobs) <= 3
        assert logprobs[token].decoded_token == llm.tokenizer.decode([token])
    timings = output.timings
    assert 0 < timings.time_to_first_token <= timings.total and timings.tokens_per_second > 0


def test_logprobs_agree_with_logits(llm):
    output = llm.generate("KING", SamplingParams(temperature=0.0, max_tokens=4, logprobs=3))[0]
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    logits = llm.logits(ids)
    for i, logprobs in enumerate(output.outputs[0].logprobs):
        row = logits[len(output.prompt_token_ids) - 1 + i].astype(np.float64)
        log_softmax = row - row.max() - np.log(np.exp(row - row.max()).sum())
        for token, entry in logprobs.items():
            assert abs(entry.logprob - log_softmax[token]) < 1e-4


def test_default_params_come_from_the_generation_config(llm, tiny_model, quiet):
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 50, 0.95)
    folder, _ = tiny_model()
    bare = tpjax.LLM(folder, max_model_len=32, **quiet)
    assert bare.get_default_sampling_params().temperature == 0.0


def test_warming_up_and_refused_calls_do_not_change_what_is_drawn(tiny_model, quiet):
    folder, _ = tiny_model()
    params = SamplingParams(temperature=1.0, max_tokens=8)

    def run(before):
        llm = tpjax.LLM(folder, 2, max_model_len=32, max_num_seqs=1, **quiet)
        before(llm)
        return tokens(llm.generate([[3, 4, 5]], params))

    def refused(llm):
        with pytest.raises(UsageError):
            llm.generate([[3], [10**6]], params)

    plain = run(lambda llm: None)
    assert run(lambda llm: llm.warm_up()) == plain == run(refused)


def test_seeds_not_given_differ_by_request_and_repeat_by_engine(tiny_model, quiet):
    folder, _ = tiny_model()
    params = SamplingParams(temperature=1.0, max_tokens=12)

    def run(seed):
        llm = tpjax.LLM(folder, 2, max_model_len=32, max_num_seqs=2, seed=seed, **quiet)
        return tokens(llm.generate([[3, 4, 5]] * 2, params))

    first = run(1)
    assert first == run(1) and first != run(2) and first[0] != first[1]


def test_streamed_text_never_breaks_a_character(llm):
    """Every byte of these characters is its own token at worst; a piece is whole or not there."""
    text = "naïve — 你好, мир 🙂🙂 é"
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)
    for cut in range(1, len(ids) + 1):
        detokenizer = Detokenizer(llm.tokenizer, ())
        pieces = []
        for token in ids[:cut]:
            detokenizer.push(token)
            pieces.append(detokenizer.new_text(finished=False))
        pieces.append(detokenizer.new_text(finished=True))
        assert "�" not in "".join(pieces) and text.startswith("".join(pieces))
    assert "".join(pieces) == text


def test_stream_takes_one_prompt(llm):
    with pytest.raises(UsageError, match="one prompt"):
        llm.stream(["a", "b"])


def test_prompts_keep_their_order_and_may_be_none(llm):
    assert llm.generate([]) == []
    texts = ["KING", "O", "First Citizen:\nWe are"]
    outputs = llm.generate(texts, SamplingParams(temperature=0.0, max_tokens=3))
    assert [o.prompt for o in outputs] == texts
