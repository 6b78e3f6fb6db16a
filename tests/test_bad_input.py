"""What a user can get wrong, and the one line that says so: of the right kind, with the names and
numbers that matter, before anything is compiled or allocated."""

import fnmatch
import json
import re
import shutil
import struct
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

import tpjax
from tpjax import SamplingParams
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint import load
from tpjax.errors import CheckpointError, ResourceError, RunError, TpjaxError, UsageError
from tpjax.executables import compiles
from tpjax.parallel.mesh import AXES, fit, make_mesh
from tpjax.plan import Plan

EXIT = {UsageError: 2, CheckpointError: 3, ResourceError: 4, RunError: 5}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@contextmanager
def refused(error, *said):
    """The block raises exactly this error, in one line that holds all of ``said``, and compiles
    nothing for it."""
    before = compiles.count
    with pytest.raises(TpjaxError) as caught:
        yield
    assert compiles.count == before
    line = str(caught.value)
    assert type(caught.value) is error and caught.value.exit_code == EXIT[error], line
    assert len(line.splitlines()) == 1, line
    assert not [word for word in said if str(word) not in line], line


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A whole, loadable checkpoint of one layer, for a test to damage."""
    made, _ = tiny_model(num_hidden_layers=1)
    return shutil.copytree(made, tmp_path / "model")


@pytest.fixture(scope="module")
def llm(tiny_model, tmp_path_factory):
    """One loaded model with a tokenizer; nothing is compiled until something is generated."""
    made, _ = tiny_model(num_hidden_layers=1, vocab_size=2048)
    folder = shutil.copytree(made, tmp_path_factory.mktemp("llm") / "model")
    for file in folders.bundled().glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return tpjax.LLM(folder, max_model_len=32, max_num_seqs=1, say=lambda line: None)


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, **changes):
    """Replace tensors; None removes one. ``model__norm`` stands for ``model.norm``."""
    tensors = load_file(folder / WEIGHTS)
    for name, value in changes.items():
        tensors[name.replace("__", ".")] = value
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)


def key(name):
    return name.replace(".", "__")


# --- folders and hub ids


@pytest.mark.parametrize("model", ["nowhere", "a/b/c", "./a/b", "/no/such", "~nobody/y", "", "\0"])
def test_neither_a_folder_nor_a_hub_id(model, monkeypatch):
    """Nothing is asked of the hub for a name that cannot be a hub id."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with refused(CheckpointError, f"{model!r}: no such folder", "org/name"):
        tpjax.LLM(model)


def test_a_name_of_absurd_length_is_cut():
    with refused(CheckpointError, "no such folder", "x'..."):
        tpjax.LLM("x" * 5000)


@pytest.mark.parametrize("model", [None, 5, ["a"]])
def test_model_is_no_path(model):
    with refused(UsageError, f"model={model!r}", "folder or a hub id"):
        tpjax.LLM(model)


def test_a_file_is_not_a_folder(folder):
    with refused(CheckpointError, folder / WEIGHTS, "give the folder that holds config.json"):
        tpjax.LLM(folder / WEIGHTS)


@pytest.mark.parametrize(
    "error, said",
    [
        (ConnectionError("cannot reach the host\nmore\n"), "cannot reach the host"),
        (OSError(), "OSError"),
        (KeyError("a key"), "a key"),
        (ValueError("x" * 999), "xxx ..."),
    ],
)
def test_a_hub_that_cannot_be_reached(monkeypatch, error, said):
    """Whatever the hub's client raises is one line; pickles and code are never asked for."""
    asked = {}

    def download(name, *, allow_patterns, ignore_patterns):
        asked.update(name=name, patterns=allow_patterns, never=ignore_patterns)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with refused(CheckpointError, "org/name-1.0: no such folder", "hub says", said, "HF_TOKEN"):
        tpjax.LLM("org/name-1.0")

    def wanted(file):
        def among(patterns):
            return any(fnmatch.fnmatch(file, pattern) for pattern in asked[patterns])

        return among("patterns") and not among("never")

    assert asked["name"] == "org/name-1.0"
    needed = ("config.json", "tokenizer.json", INDEX, WEIGHTS, "model-00001-of-00002.safetensors")
    assert all(map(wanted, needed))
    never = ("pytorch_model.bin", "modeling_x.py", "custom_generate/generate.py", "model.pth")
    assert not any(map(wanted, never))


# --- config.json and generation_config.json


def test_no_config(folder):
    (folder / "config.json").unlink()
    with refused(CheckpointError, f"{folder}: no config.json", "Hugging Face model folder"):
        tpjax.LLM(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize(
    "text, said",
    [
        ("{'vocab_size': 5}", "not valid JSON (Expecting property name"),
        ("", "not valid JSON (Expecting value: line 1 column 1"),
        ("[" * 100_000, "not valid JSON (maximum recursion"),
        ('["a"]', "holds a list, not a JSON object"),
        ("null", "holds a NoneType, not a JSON object"),
        (b"\xff\xfe{}", "not valid JSON ('utf-8' codec can't decode"),
    ],
)
def test_not_a_json_object(folder, file, text, said):
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(CheckpointError, folder / file, said, "download it again"):
        tpjax.LLM(folder)


@pytest.mark.parametrize("kind", ["gpt_bert_9000", None, ["llama"]])
def test_unknown_model_type(folder, kind):
    edit_json(folder / "config.json", model_type=kind)
    with refused(CheckpointError, folder / "config.json", "unknown model_type", "known: ", "llama"):
        tpjax.LLM(folder)


@pytest.mark.parametrize(
    "changes, said",
    [
        # refused by transformers
        ({"vocab_size": "many"}, ("'vocab_size' expected int, got str (value: 'many')",)),
        ({"num_attention_heads": 7}, ("hidden size (64)", "attention heads (7)")),
        ({"max_position_embeddings": None}, ("'max_position_embeddings' expected int",)),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ("linear", "factor")),
        # let pass by transformers, and possible for no model
        ({"num_key_value_heads": 3}, ("heads=8 is not a multiple of kv_heads=3",)),
        ({"vocab_size": 0}, ("vocab=0", "1 or more")),
        ({"num_hidden_layers": 0}, ("layers=0",)),
        ({"intermediate_size": -3}, ("mlp=-3",)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -5}}, ("rope theta=-5.0",)),
        # possible, but not here
        ({"hidden_act": "gelu"}, ("hidden_act='gelu'", "'silu'")),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            ("rope_type='yarn'", "default, linear, llama3"),
        ),
    ],
)
def test_a_config_no_llama_has(folder, changes, said):
    edit_json(folder / "config.json", **changes)
    with refused(CheckpointError, folder / "config.json", *said):
        tpjax.LLM(folder)


@pytest.mark.parametrize("eos", ["x", ["x"], 1.5, 2**40, {"a": 1}])
def test_end_of_sequence_is_no_token_id(folder, eos):
    edit_json(folder / "generation_config.json", eos_token_id=eos)
    with refused(CheckpointError, f"eos_token_id={eos!r}"):
        tpjax.LLM(folder)


def test_generation_config_with_impossible_defaults(llm, monkeypatch):
    monkeypatch.setitem(llm.folder.generation, "do_sample", True)
    monkeypatch.setitem(llm.folder.generation, "top_p", 7)
    with refused(CheckpointError, llm.folder.path, "generation_config.json", "top_p=7"):
        llm.get_default_sampling_params()


# --- weight files


def test_missing_extra_and_misshaped_tensors_are_listed_together(folder, monkeypatch):
    """One line names them all, and no weight has been read for it."""
    monkeypatch.setattr(load, "put", None)
    odd = np.ones((3, 5), np.float32)
    edit_tensors(folder, **{key(NORM): None, "odd": odd, "a\nb": odd, key(Q): odd})
    said = (f"missing {NORM}", "not part of this model: a b, odd", f"{Q} is [3, 5]", "[64, 64]")
    with refused(CheckpointError, folder, *said, "config.json and weights must be of one model"):
        tpjax.LLM(folder)


def test_a_long_list_of_missing_tensors_is_cut(folder):
    edit_json(folder / "config.json", num_hidden_layers=3)
    with refused(CheckpointError, "missing model.layers.1.self_attn", "and 10 more"):
        tpjax.LLM(folder)


@pytest.mark.parametrize("dtype, word", [(np.int64, "I64"), (np.float64, "F64"), (np.uint8, "U8")])
def test_unreadable_dtype(folder, monkeypatch, dtype, word):
    monkeypatch.setattr(load, "put", None)
    edit_tensors(folder, **{key(NORM): np.ones(64, dtype)})
    with refused(CheckpointError, folder, f"stored as {NORM} is {word}", "F32, BF16, F16"):
        tpjax.LLM(folder)


def header(length: int, text: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda whole: whole[:-100], "not fully covered"),
        (lambda whole: whole[:50], "header length"),
        (lambda whole: b"", "header too small"),
        (lambda whole: b"\xff" * 1000, "header too large"),
        (lambda whole: header(1 << 62, whole[8:]), "header too large"),
        (lambda whole: header(100, b"z" * 1000), "invalid JSON in header"),
        (lambda whole: header(8, b"\xff\xfe{}    0000"), "invalid UTF-8 in header"),
        (lambda whole: whole.replace(b'offsets":[0,', b'offsets":[1,', 1), "invalid offset"),
        (lambda whole: whole + b"more", "not fully covered"),
        (lambda whole: whole.replace(b'"F32"', b'"F99"', 1), "unknown variant"),
    ],
)
def test_damaged_safetensors(folder, damage, said):
    file = folder / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    with refused(CheckpointError, f"{file}: not a whole safetensors file", said, "download it"):
        tpjax.LLM(folder)


@pytest.mark.parametrize(
    "weight_map, said",
    [
        ("", "no weight_map"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({NORM: "../x.safetensors"}, "'../x.safetensors' points outside the folder"),
        ({NORM: "/etc/x.safetensors"}, "'/etc/x.safetensors' points outside the folder"),
        ({NORM: "gone.safetensors"}, "names 'gone.safetensors', which is not there"),
        ({NORM: "x" * 500}, "which is not there"),
        ({NORM: "a\nb"}, r"names 'a\nb', which is not there"),
        ({NORM: 5}, "names '5', which is not there"),
        ({"odd": WEIGHTS, "even": WEIGHTS}, "2 tensor(s) are not in the file the index names: odd"),
    ],
)
def test_an_index_that_cannot_be(folder, weight_map, said):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map} if weight_map != "" else {}))
    with refused(CheckpointError, folder / INDEX, said):
        tpjax.LLM(folder)


def test_an_index_that_names_the_wrong_file(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({NORM: tensors.pop(NORM)}, folder / "a.safetensors")
    save_file(tensors, folder / "b.safetensors")
    (folder / WEIGHTS).unlink()
    right = dict.fromkeys(tensors, "b.safetensors") | {NORM: "a.safetensors"}
    wrong = right | {Q: "a.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": wrong}))
    with refused(CheckpointError, folder / INDEX, "1 tensor(s) are not in the file", Q):
        tpjax.LLM(folder)


@pytest.mark.parametrize("found", ["pytorch_model.bin", "odd.safetensors", None])
def test_no_safetensors(folder, found):
    (folder / WEIGHTS).unlink()
    if found:
        (folder / found).touch()
    said = f"; found {found};" if found else "index.json; save"
    with refused(CheckpointError, f"{folder}: neither {WEIGHTS} nor {INDEX}", said, "safetensors"):
        tpjax.LLM(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_weight_that_is_not_finite(folder, stored, bad):
    """One bad element in the last of several devices' slices is found, and its weight named."""
    value = np.ones((64, 64), stored)
    value[-1, -1] = bad
    edit_tensors(folder, **{key(Q): value})
    with refused(CheckpointError, f"{folder / WEIGHTS}: {Q} holds a NaN or an infinity"):
        tpjax.LLM(folder, 4, dtype="float32", say=lambda line: None)


@pytest.mark.parametrize("value", [np.float32(65520), ml_dtypes.bfloat16(65536)])
def test_a_weight_too_large_for_the_dtype(folder, value):
    """65520 is the first number that float16 rounds to infinity."""
    edit_tensors(folder, **{key(NORM): np.full(64, value)})
    with refused(CheckpointError, f"{NORM} is too large for float16", "dtype=bfloat16 or float32"):
        tpjax.LLM(folder, dtype="float16")


# --- code from a checkpoint


class _NoStdin:
    def __getattr__(self, name):
        raise AssertionError(f"stdin.{name} was used")


@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_checkpoint_is_refused(folder, tmp_path, monkeypatch, file, tokenizer):
    """Nothing is imported from the folder, nothing is run and no question is asked on stdin."""
    if tokenizer:
        for path in folders.bundled().glob("tokenizer*.json"):
            shutil.copy(path, folder)
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    words = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    auto_map = {w: ["evil.Evil", None] if w == words[2] else "evil.Evil" for w in words}
    edit_json(folder / file, auto_map=auto_map, trust_remote_code=True)
    monkeypatch.setattr(sys, "stdin", _NoStdin())
    with refused(CheckpointError, folder / file, "auto_map", "trust_remote_code", "never"):
        tpjax.LLM(folder, say=lambda line: None)
    assert not (tmp_path / "ran").exists()


# --- tokenizers


def test_a_tokenizer_larger_than_the_embedding(folder):
    shutil.copy(folders.bundled() / "tokenizer.json", folder)
    with refused(CheckpointError, folder, "id 2047", "vocab=131"):
        tpjax.LLM(folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with refused(CheckpointError, folder, "the tokenizer cannot be loaded", "download"):
        tpjax.LLM(folder)


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


@pytest.mark.parametrize(
    "facts, degree, said",
    [
        ({}, 3, ("heads=8", "tensor=3", "work are 2 or 4")),
        ({"num_key_value_heads": 8, "intermediate_size": 100}, 8, ("mlp=100", "work are 4")),
        ({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}, 4, ("are 2 or 6",)),
        ({"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8}, 6, ("kv_heads=4",)),
    ],
)
def test_a_degree_the_model_does_not_allow(folder, facts, degree, said):
    sizes = {"num_attention_heads": 8, "hidden_size": 96} | facts
    edit_json(folder / "config.json", **sizes)
    with refused(UsageError, "cannot be split", *said):
        tpjax.LLM(folder, degree)


@st.composite
def shapes(draw):
    kv, group = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    return kv * group, kv, draw(st.integers(1, 96))


@settings(max_examples=200, deadline=None)
@given(shape=shapes(), degree=st.integers(1, 64))
def test_suggested_degrees_work_and_none_is_nearer(shape, degree):
    """Against the rule said independently: heads and MLP split evenly, and key/value heads either
    split evenly or are repeated evenly."""
    heads, kv, mlp = shape
    sizes = dict(vocab=16, embed=16, layers=1, head_dim=2)
    config = tpjax.ModelConfig(family="llama", heads=heads, kv_heads=kv, mlp=mlp, **sizes)
    works = [
        d
        for d in range(1, heads + 1)
        if heads % d == 0 and mlp % d == 0 and (kv % d == 0 or d % kv == 0)
    ]

    def try_(d):
        fitted = fit(make_mesh(tensor=d, devices=jax.devices()[:1] * d), config)
        assert fitted.shape["tensor"] * fitted.shape["rep"] == d
        assert heads % d == 0 and kv % fitted.shape["tensor"] == 0

    if degree in works:
        return try_(degree)
    with pytest.raises(UsageError) as caught:
        try_(degree)
    suggested = [int(d) for d in re.findall(r"\d+", str(caught.value).split("that work are")[1])]
    nearest = [d for d in works if d < degree][-1:] + [d for d in works if d > degree][:1]
    assert suggested == nearest
    for d in suggested:
        try_(d)


def test_repeating_heads_that_could_be_split():
    """An explicit ``rep`` is for key/value heads that cannot be split further."""
    sizes = dict(family="llama", vocab=16, embed=16, layers=1, head_dim=2, mlp=16)
    config = tpjax.ModelConfig(heads=8, kv_heads=4, **sizes)
    with refused(UsageError, "rep=2", "tensor=2", "kv_heads=4", "work are 4"):
        fit(make_mesh(tensor=2, rep=2), config)


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
