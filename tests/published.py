"""Published models: what their config.json says, and what tpjax makes of it."""

import functools
import json
from pathlib import Path

from tpjax.checkpoint.folder import config_only, model_config, with_dtype
from tpjax.config import ModelConfig
from tpjax.models import Family
from tpjax.planner.models import shortened

CONFIGS = {
    file.stem: file for file in sorted((Path(__file__).parent / "data/configs").glob("*.json"))
}
# Of families that have no file among the published configs.
GEMMA_2B = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 16384,
    "vocab_size": 256000,
    "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
}
QWEN_MOE = {
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "vocab_size": 151936,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 8192,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
LITERAL = {"gemma-2b": GEMMA_2B, "qwen1.5-moe-a2.7b": QWEN_MOE}


@functools.cache
def resolved(name: str) -> tuple[ModelConfig, Family, dict]:
    """The facts of a published model, its family, and its config.json."""
    if name in CONFIGS:
        folder, raw = config_only(CONFIGS[name]), CONFIGS[name].read_text()
        return folder.config, folder.family, json.loads(raw)
    return *model_config(LITERAL[name], name), LITERAL[name]


def published(name: str, layers: int | None = None) -> ModelConfig:
    """A published model in bfloat16, whole or with ``layers`` of its layers."""
    config = with_dtype(resolved(name)[0], "bfloat16")
    return config if layers is None else shortened(config, layers)
