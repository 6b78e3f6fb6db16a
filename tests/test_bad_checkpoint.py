"""Checkpoints that cannot be used, and the one line that says so: folders, configs, weights,
tokenizers; with the names and numbers that matter, before anything is compiled."""

import fnmatch
import json
import shutil
import struct
import sys

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tpjax
from tests.bad import INDEX, NORM, WEIGHTS, Q, edit_json, edit_tensors, key, refused
from tests.families import FAMILIES
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint import load
from tpjax.errors import CheckpointError, UsageError

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
        ({"hidden_act": "tanh"}, ("activation 'tanh'", "silu", "relu")),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4, "factor": 2.0}},
            ("rope_type='spiral'", "default, linear, dynamic, llama3, yarn, longrope"),
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ("partial_rotary_factor", "llama rotates whole heads"),
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


LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0] * 4,
    "original_max_position_embeddings": 32,
}
PARTLY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "family, changes, said",
    [
        ("mixtral", {"num_experts_per_tok": 9}, "9 experts per token, but there are only 6"),
        ("mixtral", {"num_local_experts": 0}, "experts=0"),
        ("gemma3_text", {"layer_types": ["sliding_attention", "wrong"]}, "layer_types"),
        ("gemma2", {"use_bidirectional_attention": True}, "only causal models"),
        ("opt", {"layer_norm_elementwise_affine": False}, "OPT here has weights in norms"),
        ("phi3", {"rope_parameters": LONG | {"short_factor": [1.0]}}, "length 4, got 1"),
        ("phi3", {"rope_parameters": LONG | {"short_factor": [0.0] * 4}}, "must be above 0"),
        ("llama", {"rope_parameters": LONG}, "known for phi3, not for llama"),
        ("phi3", {"rope_parameters": PARTLY | {"partial_rotary_factor": 0.0}}, "= 0: must be even"),
        ("phi3", {"rope_parameters": PARTLY | {"partial_rotary_factor": 0.4}}, "= 3: must be even"),
        ("llama", {"rope_parameters": PARTLY}, "llama rotates whole heads"),
        ("llama", {"rope_parameters": YARN | {"rope_theta": 1.0}}, "not a valid llama config"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": -1}}, "beta_fast=-1.0: must be above 0"),
        ("mistral", {"sliding_window": -1}, "sliding_window=-1: must be 1 or more"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
        ("llama", {"per_layer_config": {"0": {"hidden_act": "relu"}}}, "per_layer_config"),
    ],
)
def test_a_config_no_family_has(tmp_path, family, changes, said):
    """The same for what only some families say."""
    next(iter(FAMILIES[family].values())).make(tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", **changes)
    with refused(CheckpointError, tmp_path / "model" / "config.json", said):
        tpjax.LLM(tmp_path / "model")
