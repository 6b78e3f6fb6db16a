"""The model is right: on every mesh and in every variant it computes what transformers computes."""

import json
import shutil
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import transformers

import tpjax
from tests import reference, tiny
from tests.reference import agrees, distance, load, prompt
from tpjax.buckets import CHUNKS
from tpjax.checkpoint import folder as folders

BFLOAT16 = 0.08  # of the largest logit; 0.04 to 0.06 measured, and as much by transformers itself
SMALL, MIDDLE, LARGE = CHUNKS
FACTS = {"max_position_embeddings": 2 * LARGE}
MHA = {"num_key_value_heads": 8}


@dataclass(frozen=True)
class Case:
    """A model, how it is spread, and what is asked of it. ``mesh`` is data x tensor x rep.

    Below the largest chunk in length, only the smaller ones are used (and compiled).
    """

    mesh: tuple[int, int, int] = (1, 4, 1)
    facts: dict = field(default_factory=dict)
    max_model_len: int = LARGE - 1
    lengths: tuple[int, ...] = (3, SMALL + 1, MIDDLE + 6)
    tokens: int = 64


MESHES = {
    "tensor=1": Case((1, 1, 1)),
    "tensor=2": Case((1, 2, 1)),
    "tensor=4": Case((1, 4, 1)),
    "tensor=8": Case((1, 8, 1), MHA),
    "tensor=4 x rep=2, long": Case(
        (1, 4, 2), max_model_len=2 * LARGE, lengths=(3, SMALL + 1, MIDDLE + 6, LARGE + 6)
    ),
    "tensor=2 x rep=4": Case((1, 2, 4), {"num_key_value_heads": 2}),
    "data=2 x tensor=4": Case((2, 4, 1)),
}
VARIANTS = {
    "untied, even vocabulary": {"vocab_size": 128},
    "one device holds only padding": {"vocab_size": 9},
}
CASES = MESHES | {
    name: Case(facts=facts, max_model_len=MIDDLE - 1, lengths=(3 * SMALL + 4,), tokens=16)
    for name, facts in VARIANTS.items()
}


EXTRA = ("tensor=2", "tensor=4", "tensor=2 x rep=4")  # what others cover, and test_families.py


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id=name, marks=pytest.mark.extra if name in EXTRA else ())
        for name, case in CASES.items()
    ],
)
def case(request, tiny_model):
    """A case, and its model here and in transformers."""
    case = request.param
    folder, hf = tiny_model(**FACTS | case.facts)
    data, tensor, rep = case.mesh
    words = {"data_parallel_size": data, "max_model_len": case.max_model_len}
    return case, load(folder, tensor * rep, **words), hf


def test_logits(case):
    """Every position of the longest prompt, which takes several chunks, on the mesh meant."""
    case, llm, hf = case
    assert tuple(llm.plan.mesh.shape[a] for a in ("data", "tensor", "rep")) == case.mesh
    assert agrees(llm, hf, prompt(case.lengths[-1], llm.config.vocab))


def test_greedy_tokens(case):
    """Prompts of different lengths, decoded together, each get transformers' own tokens."""
    case, llm, hf = case
    prompts = [prompt(n, llm.config.vocab) for n in case.lengths]
    params = tpjax.SamplingParams(temperature=0, max_tokens=case.tokens)
    got = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
    assert got == [reference.greedy(hf, ids, case.tokens) for ids in prompts]


@pytest.mark.parametrize("tensor", [1, 8])
def test_every_layer(tiny_model, tensor):
    """The embedding, each layer and the final norm: no two errors that cancel."""
    folder, hf = tiny_model(**FACTS)
    llm = load(folder, tensor, max_model_len=64)
    ids = prompt(40)

    got = llm.states(ids)
    want = reference.states(hf, ids)
    apart = [distance(g, w) for g, w in zip(got, want, strict=True)]
    assert len(apart) == llm.config.layers + 2
    assert max(apart) <= reference.TOLERANCE, apart


@pytest.mark.parametrize("tensor", [3, 8])
def test_sum_algorithms_agree(tiny_model, tensor):
    """Reduce-scatter and all-gather make the sum that one all-reduce makes; 3 devices do not divide
    the stream, 8 are two axes."""
    folder, _ = tiny_model(**FACTS)
    mesh = tpjax.make_mesh(tensor=tensor)
    one, other = (
        load(folder, plan=tpjax.Plan(mesh=mesh, sum_algorithm=algorithm), max_model_len=64)
        for algorithm in ("xla", "rs_ag")
    )
    assert "reduce_scatter" in other.executables.lower(f"score[t{SMALL}]").as_text()
    assert distance(other.logits(prompt(60)), one.logits(prompt(60))) <= 1e-5


def test_sharded_checkpoint(tiny_model, tmp_path):
    """Several files with an index are the same model as one file, to the bit."""
    folder, hf = tiny_model(**FACTS)
    hf.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    one, many = (load(f, 4, max_model_len=64).logits(prompt(60)) for f in (folder, tmp_path))
    np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("tensor", [1, 4])
def test_computing_in_bfloat16(tiny_model, tensor):
    """Rounded weights and activations stay near the float32 reference, but are not it."""
    folder, hf = tiny_model(**FACTS)
    llm = load(folder, tensor, dtype="bfloat16", max_model_len=64)
    assert agrees(llm, hf, tolerance=BFLOAT16)
    assert not agrees(llm, hf)


def test_stored_in_bfloat16(tiny_model, tmp_path):
    """A bfloat16 checkpoint is widened without loss: float32 accuracy on its rounded weights."""
    folder, _ = tiny_model(**FACTS, dtype=torch.bfloat16)
    hf = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    llm = load(folder, 4, dtype="float32", max_model_len=64)
    assert llm.folder.stored_dtype == "bfloat16"
    raw = json.loads((folder / "config.json").read_text())
    copy = shutil.copytree(folder, tmp_path / "unnamed")
    (copy / "config.json").write_text(json.dumps({k: raw[k] for k in raw if "dtype" not in k}))
    assert folders.read_folder(copy).stored_dtype == "bfloat16"  # as its tensors say
    assert agrees(llm, hf)


def test_bundled_model():
    """The model that ships: its logits, and the text it makes, are transformers'."""
    llm = load(folders.bundled(), 4, dtype="float32", max_model_len=64)
    hf = transformers.LlamaForCausalLM.from_pretrained(llm.folder.path, dtype=torch.float32)
    hf.generation_config = transformers.GenerationConfig(eos_token_id=list(llm.eos_ids))
    text = "ROMEO:\nBut soft, what light"
    ids = tuple(llm.tokenizer.encode(text))
    assert agrees(llm, hf, ids)
    params = tpjax.SamplingParams(temperature=0, max_tokens=32)
    (made,) = llm.generate(text, params)
    want = llm.tokenizer.decode(reference.greedy(hf, ids, 32), skip_special_tokens=True)
    assert made.outputs[0].text == want != ""


@pytest.mark.parametrize(
    ("now", "before"),
    [
        ({"rope_type": "default"}, None),
        (tiny.LINEAR_ROPE, {"type": "linear", "factor": 4.0}),
        (tiny.LLAMA3_ROPE, {k: v for k, v in tiny.LLAMA3_ROPE.items() if k != "rope_theta"}),
    ],
    ids=["default", "linear", "llama3"],
)
def test_old_config_keys(tiny_model, tmp_path, now, before):
    """A config as Llama 1 to 3 were published with means the same as today's spelling of it."""
    folder, _ = tiny_model(**FACTS, **MHA, rope_parameters={"rope_theta": 10000.0} | now)
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
    raw["rope_scaling"] = before
    raw["torch_dtype"] = raw.pop("dtype")
    for key in ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias"):
        del raw[key]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    old, new = folders.read_folder(tmp_path), folders.read_folder(folder)
    assert (old.config, old.stored_dtype) == (new.config, new.stored_dtype)
    assert new.config.rope.kind == now["rope_type"]
