"""Published models, from their config.json alone: how many parameters they have, and what their
tensors are called."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests import families, reference
from tests.published import CONFIGS, LITERAL, resolved
from tpjax.checkpoint.folder import model_config, read_folder
from tpjax.checkpoint.safetensors import SafetensorsFolder
from tpjax.checkpoint.tensors import Tensors
from tpjax.errors import CheckpointError
from tpjax.models import FAMILIES
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan
from tpjax.weights import WeightTable

# In billions, as their authors count them: tied weights once.
COUNTS = {
    "gemma-2-9b-it": "9.242",
    "gemma-2b": "2.506",
    "gemma-3-1b-it": "1.000",
    "llama-2-7b": "6.738",
    "llama-2-13b": "13.016",
    "llama-2-70b": "68.977",
    "llama-3.1-8b-instruct": "8.030",
    "llama-3.1-70b-instruct": "70.554",
    "llama-3.1-405b-instruct": "405.853",
    "llama-3.2-1b": "1.236",
    "llama-3.2-3b": "3.213",
    "meta-llama-3-8b": "8.030",
    "meta-llama-3-70b-instruct": "70.554",
    "mistral-7b-v0.1": "7.242",
    "mistral-7b-instruct-v0.3": "7.248",
    "mixtral-8x7b-v0.1": "46.703",
    "mixtral-8x22b-v0.1": "140.621",  # 140.630 is Instruct, whose vocabulary has 32,768 entries
    "opt-125m": "0.125",
    "opt-175b": "174.604",
    "phi-3-mini-4k": "3.821",
    "qwen1.5-moe-a2.7b": "14.316",
    "qwen2.5-0.5b": "0.494",
    "qwen2.5-7b-instruct": "7.616",
    "qwen3-8b": "8.191",
    "qwen3-30b-a3b": "30.532",
    "tinyllama-1.1b": "1.100",
}
# Gemma-3-4b-it: text and pictures, of which only the text is here.
GEMMA_3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 10240,
        "vocab_size": 262208,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}


def table_of(config, **sizes) -> WeightTable:
    return WeightTable(config, Plan(mesh=make_mesh(**sizes)).fit(config))


# --- parameters


def test_every_published_config_is_counted():
    assert COUNTS.keys() == CONFIGS.keys() | LITERAL.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    """As published, and to the last one as transformers counts them."""
    config, _, raw = resolved(name)
    count = WeightTable(config, Plan(mesh=make_mesh())).parameters
    assert f"{count / 1e9:.3f}" == COUNTS[name]
    with torch.device("meta"):
        hf = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        model = transformers.AutoModelForCausalLM.from_config(hf)
    assert count == sum(parameter.numel() for parameter in model.parameters())


# --- names

TINY = {
    f"{family}: {n}": tiny for family, of in families.FAMILIES.items() for n, tiny in of.items()
}


def needed(config, family, stored=(), **sizes) -> dict:
    """The tensors a model is loaded from: their names and shapes."""
    return {t.name: t.shape for t in Tensors(table_of(config, **sizes), family, stored).all}


@pytest.mark.parametrize("name", TINY)
def test_needs_the_tensors_that_transformers_writes(tmp_path, name):
    """No more and no fewer, whatever the devices hold of them."""
    TINY[name].make(tmp_path)
    folder = read_folder(tmp_path)
    written = {n: t.shape for n, t in SafetensorsFolder(tmp_path).tensors.items()}
    assert needed(folder.config, folder.family) == written
    assert needed(folder.config, folder.family, tensor=3) == written


# How many tensors the published files hold, and some of them.
NAMES = {
    "llama-3.1-8b-instruct": (
        291,
        {
            "model.embed_tokens.weight": (128256, 4096),
            "model.layers.0.self_attn.q_proj.weight": (4096, 4096),
            "model.layers.31.self_attn.k_proj.weight": (1024, 4096),
            "model.layers.0.mlp.down_proj.weight": (4096, 14336),
            "model.layers.0.input_layernorm.weight": (4096,),
            "model.layers.0.post_attention_layernorm.weight": (4096,),
            "model.norm.weight": (4096,),
            "lm_head.weight": (128256, 4096),
        },
    ),
    "mistral-7b-v0.1": (
        291,
        {
            "model.layers.31.self_attn.v_proj.weight": (1024, 4096),
            "model.layers.31.mlp.up_proj.weight": (14336, 4096),
            "lm_head.weight": (32000, 4096),
        },
    ),
    "mixtral-8x7b-v0.1": (
        995,
        {
            "model.layers.0.block_sparse_moe.gate.weight": (8, 4096),
            "model.layers.0.block_sparse_moe.experts.7.w1.weight": (14336, 4096),
            "model.layers.31.block_sparse_moe.experts.0.w2.weight": (4096, 14336),
            "model.layers.31.block_sparse_moe.experts.7.w3.weight": (14336, 4096),
            "model.layers.0.self_attn.o_proj.weight": (4096, 4096),
        },
    ),
    "qwen2.5-7b-instruct": (
        339,
        {
            "model.layers.27.self_attn.q_proj.bias": (3584,),
            "model.layers.0.self_attn.k_proj.bias": (512,),
            "model.layers.0.self_attn.v_proj.bias": (512,),
            "model.layers.0.mlp.gate_proj.weight": (18944, 3584),
            "lm_head.weight": (152064, 3584),
        },
    ),
    "qwen1.5-moe-a2.7b": (
        4659,
        {
            "model.layers.0.mlp.gate.weight": (60, 2048),
            "model.layers.23.mlp.experts.59.gate_proj.weight": (1408, 2048),
            "model.layers.0.mlp.experts.0.down_proj.weight": (2048, 1408),
            "model.layers.0.mlp.shared_expert.up_proj.weight": (5632, 2048),
            "model.layers.0.mlp.shared_expert_gate.weight": (1, 2048),
            "model.layers.0.self_attn.q_proj.bias": (2048,),
        },
    ),
    "qwen3-8b": (
        399,
        {
            "model.layers.35.self_attn.q_norm.weight": (128,),
            "model.layers.0.self_attn.k_norm.weight": (128,),
            "model.layers.0.self_attn.k_proj.weight": (1024, 4096),
            "lm_head.weight": (151936, 4096),
        },
    ),
    "qwen3-30b-a3b": (
        18867,
        {
            "model.layers.47.mlp.experts.127.up_proj.weight": (768, 2048),
            "model.layers.0.mlp.experts.0.down_proj.weight": (2048, 768),
            "model.layers.0.mlp.gate.weight": (128, 2048),
            "model.layers.0.self_attn.q_proj.weight": (4096, 2048),
            "model.layers.0.self_attn.q_norm.weight": (128,),
        },
    ),
    "gemma-2b": (
        164,
        {
            "model.embed_tokens.weight": (256000, 2048),
            "model.layers.17.self_attn.k_proj.weight": (256, 2048),
            "model.layers.0.post_attention_layernorm.weight": (2048,),
            "model.norm.weight": (2048,),
        },
    ),
    "gemma-2-9b-it": (
        464,
        {
            "model.layers.0.pre_feedforward_layernorm.weight": (3584,),
            "model.layers.41.post_feedforward_layernorm.weight": (3584,),
            "model.layers.0.self_attn.o_proj.weight": (3584, 4096),
        },
    ),
    "gemma-3-1b-it": (
        340,
        {
            "model.layers.0.self_attn.q_norm.weight": (256,),
            "model.layers.25.self_attn.k_proj.weight": (256, 1152),
            "model.layers.0.post_attention_layernorm.weight": (1152,),
        },
    ),
    "phi-3-mini-4k": (
        195,
        {
            "model.layers.31.self_attn.qkv_proj.weight": (9216, 3072),
            "model.layers.0.mlp.gate_up_proj.weight": (16384, 3072),
            "model.layers.0.mlp.down_proj.weight": (3072, 8192),
        },
    ),
    "opt-125m": (
        196,
        {
            "model.decoder.embed_tokens.weight": (50272, 768),
            "model.decoder.embed_positions.weight": (2050, 768),
            "model.decoder.layers.0.fc1.bias": (3072,),
            "model.decoder.layers.11.fc2.weight": (768, 3072),
            "model.decoder.layers.0.self_attn.out_proj.bias": (768,),
            "model.decoder.layers.0.self_attn_layer_norm.weight": (768,),
            "model.decoder.layers.0.final_layer_norm.bias": (768,),
            "model.decoder.final_layer_norm.bias": (768,),
        },
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_needs_the_tensors_that_are_published(name):
    config, family, _ = resolved(name)
    number, some = NAMES[name]
    found = needed(config, family)
    assert len(found) == number
    assert {n: found.get(n) for n in some} == some


def test_names_are_published_for_every_family():
    assert {resolved(name)[1].model_type for name in NAMES} == FAMILIES.keys() - {"gemma3"}


# --- Gemma 3 with pictures

OF_TEXT, OF_OTHERS = "language_model.model.", ("vision_tower.", "multi_modal_projector.")


@pytest.mark.parametrize("root", [OF_TEXT, "model.language_model."])
def test_names_of_gemma_3_with_pictures(root):
    config, family = model_config(GEMMA_3_4B, "gemma-3-4b-it")
    some = {
        f"{root}embed_tokens.weight": (262208, 2560),
        f"{root}layers.0.self_attn.q_proj.weight": (2048, 2560),
        f"{root}layers.33.self_attn.k_norm.weight": (256,),
        f"{root}layers.33.mlp.down_proj.weight": (2560, 10240),
        f"{root}norm.weight": (2560,),
    }
    found = needed(config, family, stored=some)
    assert len(found) == 34 * 13 + 2 and {n: found.get(n) for n in some} == some


@pytest.fixture(scope="module")
def with_pictures(tmp_path_factory):
    """A tiny Gemma 3 with a tiny vision tower, saved by transformers, and what it computes."""
    folder = tmp_path_factory.mktemp("gemma3")
    text = families.USUAL | families.WINDOW | {"num_hidden_layers": 3, "sliding_window_pattern": 2}
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config=text | {"tie_word_embeddings": True},
        vision_config=transformers.SiglipVisionConfig(**vision, image_size=28, patch_size=14),
        mm_tokens_per_image=4,
        boi_token_index=131,
        eoi_token_index=132,
        image_token_index=133,
    )
    return folder, families.save(folder, config, kind="AutoModelForImageTextToText")


def as_saved(name: str) -> str:
    return name


def as_published(name: str) -> str:
    """As in Google's files: transformers has since dropped a word of the vision tower's names."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def as_in_memory(name: str) -> str:
    """What transformers calls them once loaded, and some tools write."""
    if name.startswith(OF_TEXT):
        return "model.language_model." + name.removeprefix(OF_TEXT)
    return f"model.{name}"


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_an_untied_head_of_gemma_3(with_pictures, tmp_path, prefix):
    """By today's name or by Google's, a head of its own is found."""
    folder, _ = with_pictures
    tensors = load_file(folder / "model.safetensors")
    own = -tensors["language_model.model.embed_tokens.weight"]
    head = {f"{prefix}lm_head.weight": own}
    save_file(tensors | head, tmp_path / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    llm = reference.load(tmp_path, 2)
    at = [spec.path for spec in llm.table.specs].index("head")
    assert np.array_equal(np.asarray(llm.weights[at])[: len(own)], own)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="lm_head"):  # tied, and yet another matrix
        reference.load(tmp_path, 2)


IGNORED_WORDS = {
    "llama": {"hidden_activation": "relu"},
    "gemma": {"hidden_activation": "relu"},
    "mistral": {"attention_bias": True},
    "mixtral": {"attention_bias": True, "layer_types": ["full_attention"] * 2},
    "phi3": {"layer_types": ["full_attention", "sliding_attention"]},
    "qwen3_moe": {"layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("family", IGNORED_WORDS)
def test_words_that_transformers_does_not_heed(tmp_path, family):
    """What a config says beside what its family reads changes nothing, there or here."""
    tiny = list(families.FAMILIES[family].values())[-1]
    hf = tiny.make(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    plain, _ = model_config(config, "plain")
    more = config | IGNORED_WORDS[family]
    assert model_config(more, "more")[0] == plain
    (tmp_path / "config.json").write_text(json.dumps(more))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = reference.prompt(40)
    assert np.array_equal(reference.logits(again.eval(), ids), reference.logits(hf, ids))


@pytest.mark.parametrize("renamed", [as_saved, as_published, as_in_memory])
def test_the_text_part_of_gemma_3(with_pictures, tmp_path, renamed):
    """A folder of text and pictures is loaded as the text model it holds, by any of its names."""
    folder, hf = with_pictures
    tensors = load_file(folder / "model.safetensors")
    parts = {next(p for p in (OF_TEXT, *OF_OTHERS) if name.startswith(p)) for name in tensors}
    assert parts == {OF_TEXT, *OF_OTHERS}
    save_file({renamed(n): x for n, x in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert reference.agrees(reference.load(tmp_path, 2), hf)
