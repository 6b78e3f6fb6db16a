"""Calls that cannot be meant, and the one line that says so: degrees, memory, parameters, prompts;
with the names and numbers that matter, before anything is compiled or allocated."""

import shutil
from types import SimpleNamespace

import jax
import numpy as np
import psutil
import pytest
from jax.sharding import Mesh

import tpjax
from tests.bad import WEIGHTS, refused
from tpjax import SamplingParams
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint import load
from tpjax.config import MoE
from tpjax.errors import CheckpointError, ResourceError, RunError, UsageError
from tpjax.parallel.degrees import AXES
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan


@pytest.fixture(scope="module")
def llm(tiny_model, tmp_path_factory):
    """One loaded model with a tokenizer; nothing is compiled until something is generated."""
    made, _ = tiny_model(num_hidden_layers=1, vocab_size=2048)
    folder = shutil.copytree(made, tmp_path_factory.mktemp("llm") / "model")
    for file in folders.bundled().glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return tpjax.LLM(folder, max_model_len=32, max_num_seqs=1, say=lambda line: None)


# --- devices, degrees and memory


def test_more_devices_than_there_are(folder):
    said = ("data=2 x tensor=8", "needs 16 devices", "8 cpu", "--devices 16", "jax_num_cpu_devices")
    with refused(ResourceError, *said):
        tpjax.LLM(folder, 8, data_parallel_size=2)


@pytest.mark.parametrize("size", [0, -1, 1.5, "2"])
@pytest.mark.parametrize(
    "word, axis", [("tensor_parallel_size", "tensor"), ("data_parallel_size", "data")]
)
def test_mesh_sizes_are_whole_numbers_from_one(folder, word, axis, size):
    with refused(UsageError, f"mesh axis {axis}={size!r}", "1 or more"):
        tpjax.LLM(folder, **{word: size})


@pytest.mark.parametrize(
    "mesh",
    [
        lambda devices: Mesh(devices[:2], ("model",)),
        lambda devices: Mesh(devices[:2].reshape(1, 2), ("data", "tensor")),
        lambda devices: Mesh(devices[:2].reshape(2, 1, 1), ("tensor", "data", "rep")),
    ],
)
def test_a_foreign_mesh(folder, mesh):
    mesh = mesh(np.array(jax.devices()))
    with refused(UsageError, f"mesh axes {mesh.axis_names}", "tpjax.make_mesh", AXES):
        tpjax.LLM(folder, mesh=mesh)


@pytest.mark.parametrize("word", ["mesh", "plan"])
def test_neither_a_mesh_nor_a_plan(folder, word):
    with refused(UsageError, f"{word}='tensor=2'", "tpjax."):
        tpjax.LLM(folder, **{word: "tensor=2"})


def test_plan_mesh_and_sizes_exclude_each_other(folder):
    mesh = make_mesh()
    for both in (
        {"plan": Plan(mesh=mesh), "mesh": mesh},
        {"plan": Plan(mesh=mesh), "tensor_parallel_size": 1},
        {"mesh": mesh, "data_parallel_size": 1},
    ):
        with refused(UsageError, "give one of plan, mesh, or tensor_parallel_size"):
            tpjax.LLM(folder, **both)


@pytest.mark.parametrize("degree, near", [(9, 8), (64, 8)])
def test_more_devices_than_query_heads(folder, degree, near):
    plan = Plan(mesh=make_mesh(tensor=degree, devices=jax.devices()[:1] * degree))
    said = f"{degree} devices are more than heads=8: the nearest tensor degree that works is {near}"
    with refused(UsageError, said):
        tpjax.LLM(folder, plan=plan)


def test_experts_where_there_are_none(folder):
    with refused(UsageError, "expert=2", "llama has no experts", "use tensor", "works is 2"):
        tpjax.LLM(folder, expert_parallel_size=2)


@pytest.mark.parametrize(
    "expert, tensor, near", [(5, 1, "expert=4 x tensor=1"), (4, 3, "expert=4 x tensor=2")]
)
def test_more_devices_than_experts_or_heads(expert, tensor, near):
    sizes = dict(family="mixtral", vocab=16, embed=16, layers=1, head_dim=2, mlp=16)
    moe = MoE(experts=4, per_token=2, mlp=16, layers=(True,))
    config = tpjax.ModelConfig(heads=8, kv_heads=4, moe=moe, **sizes)
    devices = jax.devices()[:1] * expert * tensor
    mesh = make_mesh(expert=expert, tensor=tensor, devices=devices)
    with refused(UsageError, f"nearest that works is {near}"):
        Plan(mesh=mesh).fit(config)
    Plan(mesh=make_mesh(expert=4, tensor=2, devices=jax.devices())).fit(config)


@pytest.fixture
def no_allocation(monkeypatch):
    monkeypatch.setattr(load, "put", None)
    monkeypatch.setattr(load, "random", None)


def test_not_enough_memory_for_a_checkpoint(folder, monkeypatch, no_allocation):
    """Told before a single weight is read, and before its files are even opened."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    (folder / WEIGHTS).unlink()
    with refused(ResourceError, "not enough memory", "0.00 GB are free", "lower max_model_len"):
        tpjax.LLM(folder)


def test_the_numbers_of_not_enough_memory(tmp_path, monkeypatch, no_allocation):
    """Llama 7B in float32 on two devices: half of 6.74 billion parameters and half of nine caches
    of 2048 positions, a mebibyte each, against half of what is free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10e9))
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama"}')
    said = ("each of 2 device(s)", "13.48 GB for weights", "9.66 GB for the cache", "5.00 GB are")
    with refused(ResourceError, *said, "8 sequences of 2048 positions", "max_num_seqs"):
        tpjax.LLM(config, 2, random_weights=True)


# --- arguments of LLM


@pytest.mark.parametrize(
    "words, said",
    [
        ({"dtype": "float64"}, ("dtype='float64'", "auto, float32, bfloat16, float16")),
        ({"dtype": np.float32}, ("dtype=", "auto, float32")),
        ({"dtype": np.dtype("float32")}, ("dtype=", "auto, float32")),
        ({"max_model_len": 257}, ("max_model_len=257", "max_position_embeddings=256")),
        *[({"max_model_len": n}, (f"len={n!r}", "2 or more")) for n in (1, 0, -5, 9.5, "9")],
        *[({"max_num_seqs": n}, (f"max_num_seqs={n!r}", "1 or more")) for n in (0, 1.5, None)],
        *[({"seed": n}, (f"seed={n!r}", "whole number")) for n in (-1, 2**32, 0.5, None)],
        ({"tp": 2}, ("'tp'", "called tensor_parallel_size")),
        ({"max_length": 2}, ("'max_length'", "called max_model_len")),
        ({"max_batch_size": 2}, ("'max_batch_size'", "called max_num_seqs")),
        ({"torch_dtype": "float32"}, ("'torch_dtype'", "called dtype")),
        ({"trust_remote_code": True}, ("'trust_remote_code'", "never run here")),
        ({"gpu_memory_utilization": 0.9}, ("'gpu_memory_utilization'", "leave it out")),
        ({"frobnicate": 1}, ("'frobnicate'", "known: model, tensor_parallel_size")),
    ],
)
def test_arguments_of_llm(folder, no_allocation, words, said):
    with refused(UsageError, *said):
        tpjax.LLM(folder, **words)


# --- sampling parameters


@pytest.mark.parametrize(
    "words, said",
    [
        *[
            ({"temperature": t}, "0 (greedy) or more")
            for t in (-0.1, np.nan, np.inf, 1e39, "hot", None, [1.0])
        ],
        *[({"top_p": p}, "above 0 and at most 1") for p in (0, 1.5, -1, np.nan, "0.5", None)],
        *[({"min_p": p}, "between 0 and 1") for p in (-0.1, 1.1, np.nan, "x", None)],
        *[({"top_k": k}, "0 for all") for k in (-2, 1.5, "5", None)],
        *[({"max_tokens": n}, "1 or more") for n in (0, -1, 1.5, "9", None)],
        *[({"seed": s}, "between 0 and 2**64 - 1") for s in (-1, 2**64, 0.5, "x")],
        *[({"logprobs": n}, "between 0 and 20") for n in (-1, 21, 1.5, "x")],
        *[({"stop": s}, "not empty") for s in ("", ["a", ""], [1], 5, b"x")],
        *[({"stop_token_ids": i}, "token ids, 0 or more") for i in ([-1], [1.5], "ab", [None])],
        *[({"ignore_eos": x}, "True or False") for x in ("no", None, 1)],
    ],
)
def test_sampling_values(words, said):
    """The line names the word, shows the value and says what it must be."""
    (name,) = words
    with refused(UsageError, f"{name}=", "must be", said):
        SamplingParams(**words)


@pytest.mark.parametrize(
    "word, right",
    [
        ("max_new_tokens", "called max_tokens"),
        ("max_length", "called max_tokens"),
        ("stop_strings", "called stop"),
        ("eos_token_id", "called stop_token_ids"),
        ("top_logprobs", "called logprobs"),
        ("random_seed", "called seed"),
        ("temp", "called temperature"),
        ("frobnicate", "known: temperature, top_k"),
    ],
)
def test_sampling_words(word, right):
    with refused(UsageError, f"SamplingParams: unknown argument {word!r}", right):
        SamplingParams(**{word: 1})


def test_sampling_values_that_are_fine():
    """Numpy's numbers, both ways to say no top_k, and every bound itself."""
    SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**64 - 1))
    SamplingParams(temperature=0, top_p=1, min_p=0, top_k=-1, max_tokens=1, seed=0, logprobs=0)
    SamplingParams(temperature=3e38, top_p=1e-9, min_p=1, top_k=0, seed=2**64 - 1, logprobs=20)
    many = SamplingParams(stop="ab", stop_token_ids=np.array([1, 2]))
    assert many.stop == ("ab",) and many.stop_token_ids == (1, 2)
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams(stop=[])


# --- prompts


@pytest.mark.parametrize(
    "prompts, said",
    [
        ("", ("empty prompt",)),
        (["fine", ""], ("empty prompt",)),
        ([[]], ("empty prompt",)),
        ([[1], []], ("empty prompt",)),
        ([[1, 2], [1, 2048]], ("token id 2048", "vocab=2048")),
        ([-1], ("token id -1", "vocab=2048")),
        (list(range(32)), ("prompt has 32 tokens", "max_model_len=32", "allows 31", "shorten")),
        ([1, 1.5], ("1.5", "whole numbers")),
        ([["a"]], ("'a'", "whole numbers")),
        ({"prompt": "x"}, ("{'prompt': 'x'}", "list of token ids")),
        ([{"prompt": "x"}], ("{'prompt': 'x'}", "list of token ids")),
        (5, ("5", "list of token ids")),
        (None, ("None", "list of token ids")),
        ([[1], None], ("None", "list of token ids")),
        (b"abc", ("b'abc'", "list of token ids")),
        ("\ud800", (r"'\ud800'", "tokenizer")),
    ],
)
def test_prompts(llm, prompts, said):
    """Refused before anything is built or run, also when only one of several is wrong."""
    built = set(llm.executables.built)
    with refused(UsageError, *said):
        llm.generate(prompts, SamplingParams(temperature=0.0))
    assert set(llm.executables.built) == built


@pytest.mark.parametrize(
    "params, said",
    [
        ([SamplingParams()] * 3, ("2 prompts but 3 sampling_params",)),
        ([], ("2 prompts but 0 sampling_params",)),
        ({"temperature": 0}, ("{'temperature': 0}", "give SamplingParams")),
        (SamplingParams, ("give SamplingParams",)),
        ([SamplingParams(), 5], ("5", "give SamplingParams")),
        (SamplingParams(stop_token_ids=[7, 2048]), ("stop_token_ids [2048]", "vocab=2048")),
    ],
)
def test_sampling_params_of_a_call(llm, params, said):
    with refused(UsageError, *said):
        llm.generate([[1], [2]], params)


def test_streaming_takes_one_prompt(llm):
    """Said by the call, not by the first step of the iterator."""
    with refused(UsageError, "stream takes one prompt"):
        llm.stream(["a", "b"])
    with refused(UsageError, "empty prompt"):
        llm.stream("")


def test_logits_check_their_ids(llm):
    for ids, said in ([], "empty prompt"), ([9999], "token id 9999"), ([1] * 33, "allows 32"):
        with refused(UsageError, said):
            llm.logits(ids)


def test_text_without_a_tokenizer(folder, quiet):
    llm = tpjax.LLM(folder, **quiet)
    assert llm.tokenizer is None
    for call in (
        lambda: llm.generate("text"),
        lambda: llm.stream([1]),
        lambda: llm.generate([1], SamplingParams(stop="x")),
    ):
        with refused(UsageError, "tokenizer"):
            call()


# --- while running


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers(llm, monkeypatch, temperature):
    """Weights that were fine and overflow all the same end the run with the place and a way out;
    afterwards the model works as before."""
    greedy = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    before = llm.generate([1, 2, 3], greedy)[0].outputs[0].token_ids
    at = [spec.path for spec in llm.table.specs].index("norm.w")
    leaf = llm.weights[at]
    nan = jax.device_put(np.full(leaf.shape, np.nan, leaf.dtype), leaf.sharding)
    broken = (*llm.weights[:at], nan, *llm.weights[at + 1 :])
    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "weights", broken)
        with refused(RunError, "the logits are not numbers", "position 3", "dtype=bfloat16"):
            llm.generate([1, 2, 3], SamplingParams(temperature=temperature, max_tokens=3))
    assert llm.generate([1, 2, 3], greedy)[0].outputs[0].token_ids == before


def test_generation_config_with_impossible_defaults(llm, monkeypatch):
    monkeypatch.setitem(llm.folder.generation, "do_sample", True)
    monkeypatch.setitem(llm.folder.generation, "top_p", 7)
    with refused(CheckpointError, llm.folder.path, "generation_config.json", "top_p=7"):
        llm.get_default_sampling_params()
