"""Every family computes what transformers computes, layer by layer, in prefill and in decode, at
every degree."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import tpjax
from tests import reference
from tests.families import FAMILIES
from tests.reference import TOLERANCE, distance
from tpjax.executables import Executables, compiles
from tpjax.parallel.mesh import make_mesh

PROMPT, TOKENS = 40, 32  # more than the window, and than a dynamic rope was made for
CASES = {f"{family}: {name}": tiny for family, of in FAMILIES.items() for name, tiny in of.items()}
FIRST = {f"{family}: {next(iter(of))}" for family, of in FAMILIES.items()}
MIXTURES = {name: tiny for name, tiny in CASES.items() if "experts" in str(tiny.facts)}
FAST_TO_COMPILE = {"xla_backend_optimization_level": "0"}


@dataclass(frozen=True)
class Made:
    """A tiny model, as transformers has it: what it says after a prompt and 32 greedy tokens."""

    folder: object
    hf: object
    ids: tuple[int, ...]
    states: list[np.ndarray]
    logits: np.ndarray


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    @functools.cache
    def get(name: str) -> Made:
        folder = tmp_path_factory.mktemp("family")
        hf = CASES[name].make(folder)
        prompt, tokens = reference.prompt_and_greedy(hf, PROMPT, TOKENS)
        ids = (*prompt, *tokens)
        return Made(
            folder, hf, ids, reference.states(hf, prompt), reference.decoded(hf, ids, PROMPT)
        )

    return get


def check(made: Made, name: str, **mesh) -> None:
    """Prefill the prompt, then decode token by token: all states of the one, all logits of the
    other, and the tokens these make."""
    model = made(name)
    llm = reference.load(model.folder, mesh=make_mesh(**mesh), max_model_len=127, max_num_seqs=1)
    assert math.prod(mesh.values()) == llm.plan.mesh.size
    states, logits = through_the_cache(llm, model.ids)
    apart = [distance(g, w) for g, w in zip(states, model.states, strict=True)]
    assert max(apart) <= TOLERANCE, apart
    assert distance(logits, model.logits) <= TOLERANCE
    # Greedy choices: the tokens after the first of them are what these logits were asked for.
    assert logits.argmax(-1)[:-1].tolist() == list(model.ids[PROMPT + 1 :])


def through_the_cache(llm: tpjax.LLM, ids) -> tuple[np.ndarray, np.ndarray]:
    """The states of a prompt, and the logits of the tokens after it, fed one by one."""
    exe: Executables = llm.executables
    compiled = {
        name: exe.lower(name).compile(FAST_TO_COMPILE)
        for name in ("zeros[b1]", "states[t128]", "score[t1]")
    }
    token = np.zeros((1, 128), np.int32)
    token[0, :PROMPT] = ids[:PROMPT]
    at = lambda n: exe.upload(np.array([n], np.int32))  # noqa: E731
    args = exe.upload(token), at(0), at(PROMPT)
    cache, states = compiled["states[t128]"](llm.weights, compiled["zeros[b1]"](), *args)
    logits = []
    for n in range(PROMPT, len(ids)):
        args = exe.upload(np.array([[ids[n]]], np.int32)), at(n), at(n + 1)
        cache, out = compiled["score[t1]"](llm.weights, cache, *args)
        logits.append(np.asarray(out)[0, 0, : llm.config.vocab])
    return np.asarray(states)[:, 0, :PROMPT], np.stack(logits)


def _degrees():
    """Every model at every degree. By default Llama's first is, of each other family the first at
    two degrees, one of which divides nothing, and every second of the others at one; which, goes
    round."""
    for number, name in enumerate(CASES):
        some = 1 + number % 8
        usual = {3, some} if name in FIRST else {some} if number % 2 else set()
        usual = range(1, 9) if number == 0 else usual
        for tensor in range(1, 9):
            marks = () if tensor in usual else pytest.mark.extra
            yield pytest.param(name, tensor, marks=marks)


@pytest.mark.parametrize("name, tensor", list(_degrees()))
def test_equal_at_every_degree(made, name, tensor):
    check(made, name, tensor=tensor)


@pytest.mark.parametrize(
    "tensor, rep",
    [(2, 4), (3, 2), *(pytest.param(*of, marks=pytest.mark.extra) for of in ((2, 2), (1, 8)))],
)
@pytest.mark.parametrize("name", ["llama: grouped", "gemma: all kv, untied"])
def test_copies_asked_for(made, name, tensor, rep):
    """Also where a device then has several key/value heads and a part of the queries of each."""
    check(made, name, tensor=tensor, rep=rep)


@pytest.mark.parametrize(
    "expert, tensor",
    [(4, 1), (4, 2), *(pytest.param(2, n, marks=pytest.mark.extra) for n in (1, 3))],
)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FIRST else pytest.mark.extra) for n in MIXTURES]
)
def test_experts_on_other_devices(made, name, expert, tensor):
    check(made, name, expert=expert, tensor=tensor)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FIRST else pytest.mark.extra) for n in CASES]
)
def test_bfloat16(made, name):
    """As near to float32 as transformers' own bfloat16 is, on average over the tokens: at most half
    as far again, behind the prompt's last norm and in the logits of tokens fed one by one. Not the
    furthest token: where two experts are nearly equal, either may be taken."""
    model = made(name)
    llm = reference.load(model.folder, 2, dtype="bfloat16", max_model_len=127, max_num_seqs=1)
    theirs = type(model.hf).from_pretrained(model.folder, dtype=torch.bfloat16).eval()
    states, logits = through_the_cache(llm, model.ids)
    for ours, half, want in (
        (states[-1], reference.states(theirs, model.ids[:PROMPT])[-1], model.states[-1]),
        (logits, reference.decoded(theirs, model.ids, PROMPT), model.logits),
    ):
        assert 1e-4 < apart(ours, want) <= 1.5 * apart(half, want)


def apart(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference of every token, on average, in units of the largest value."""
    return float(np.abs(got.astype(np.float32) - want).max(-1).mean() / np.abs(want).max())


DEGREES = {"mixtral": 3, "qwen3_moe": 7, "gemma2": 6, "opt": 5}


@pytest.mark.parametrize(
    "family, tensor",
    [
        pytest.param(*case, marks=() if case[0] in ("mixtral", "gemma2") else pytest.mark.extra)
        for case in DEGREES.items()
    ],
)
def test_the_engine_makes_the_same_tokens(made, family, tensor):
    """The whole way: chunks, rows, the sampler. It knows no families; four of them."""
    name = next(name for name in CASES if name.startswith(f"{family}: "))
    model = made(name)
    llm = reference.load(model.folder, tensor, max_model_len=127, max_num_seqs=1)
    params = tpjax.SamplingParams(temperature=0, max_tokens=TOKENS)
    (out,) = llm.generate([model.ids[:PROMPT]], params)
    assert out.outputs[0].token_ids == list(model.ids[PROMPT:])


def test_a_sequence_that_outgrows_its_rope_is_prefilled_again(made):
    """Longrope, made for 32 positions: prompts that end before, at and after it, alone and
    together, give transformers' tokens, and nothing is compiled for it."""
    model = made("phi3: longrope")
    llm = reference.load(model.folder, 2, max_model_len=127, max_num_seqs=4)
    llm.warm_up()
    params = tpjax.SamplingParams(temperature=0, max_tokens=12)
    prompts = [reference.prompt(n) for n in (5, 24, 31, 32, 33, 40)]
    before = compiles.count
    alone = [llm.generate([ids], params)[0].outputs[0].token_ids for ids in prompts]
    together = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
    assert compiles.count == before
    assert alone == together == [reference.greedy(model.hf, ids, 12) for ids in prompts]
