"""Tiny random models of every family, made and saved by transformers itself."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}

# What all tiny models are, in the words most families use.
USUAL = dict(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40, num_hidden_layers=2)
OPT = dict(
    vocab_size=131,
    hidden_size=64,
    ffn_dim=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    max_position_embeddings=256,
    word_embed_proj_dim=64,
    dropout=0.0,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
ALL_SEEN = {"num_key_value_heads": 8}
ONE_KV = {"num_key_value_heads": 1}
WINDOW = {"sliding_window": 12}


@dataclass(frozen=True)
class Tiny:
    """One tiny model: transformers' config class, and its facts."""

    config: str
    facts: dict = field(default_factory=dict)
    usual: dict = field(default_factory=lambda: USUAL)

    def make(self, folder: Path, seed: int = 0, dtype=torch.float32):
        """Save it into ``folder`` and return it in float32."""
        config = getattr(transformers, self.config)(**(self.usual | self.facts))
        return save(folder, config, seed=seed, dtype=dtype)


def save(folder: Path, config, *, seed: int = 0, dtype=torch.float32, kind="AutoModelForCausalLM"):
    """A random model of ``config``, saved into ``folder`` in ``dtype``, read back in float32.

    Weights are larger than transformers' default, so that a wrong sign or scale shows in the
    logits; biases and norms are random too.
    """
    torch.manual_seed(seed)
    auto = getattr(transformers, kind)
    model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    model.to(dtype).save_pretrained(folder)
    # Read back, not cast back: a cast would also have rounded the rotary frequencies.
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


FAMILIES: dict[str, dict[str, Tiny]] = {
    "llama": {
        "grouped": Tiny("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
        "tied, biases, linear": Tiny(
            "LlamaConfig",
            ALL_SEEN
            | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR}
            | {"tie_word_embeddings": True},
        ),
        "one kv head, dynamic": Tiny(
            "LlamaConfig", ONE_KV | {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}
        ),
    },
    "mistral": {
        "window": Tiny("MistralConfig", WINDOW),
        "no window, head_dim": Tiny("MistralConfig", {"sliding_window": None, "head_dim": 12}),
        "one kv head, tied, yarn": Tiny(
            "MistralConfig",
            ONE_KV | WINDOW | {"tie_word_embeddings": True, "rope_parameters": YARN},
        ),
    },
    "mixtral": {
        "grouped": Tiny("MixtralConfig", {"num_local_experts": 6}),
        "window, tied": Tiny(
            "MixtralConfig",
            ALL_SEEN | WINDOW | {"num_local_experts": 4, "tie_word_embeddings": True},
        ),
        "three of five": Tiny(
            "MixtralConfig", ONE_KV | {"num_local_experts": 5, "num_experts_per_tok": 3}
        ),
    },
    "qwen2": {
        "grouped": Tiny("Qwen2Config"),
        "window from layer 1": Tiny(
            "Qwen2Config",
            ALL_SEEN | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
        ),
        "tied, yarn": Tiny(
            "Qwen2Config", ONE_KV | {"tie_word_embeddings": True, "rope_parameters": YARN}
        ),
    },
    "qwen2_moe": {
        "all sparse": Tiny("Qwen2MoeConfig", MOE | {"shared_expert_intermediate_size": 72}),
        "some sparse": Tiny(
            "Qwen2MoeConfig",
            MOE
            | ALL_SEEN
            | {"shared_expert_intermediate_size": 48, "decoder_sparse_step": 2}
            | {"norm_topk_prob": True, "qkv_bias": False},
        ),
        "windows, tied": Tiny(
            "Qwen2MoeConfig",
            MOE
            | ONE_KV
            | WINDOW
            | {"shared_expert_intermediate_size": 40, "use_sliding_window": True}
            | {"max_window_layers": 1, "tie_word_embeddings": True},
        ),
    },
    "qwen3": {
        "grouped": Tiny("Qwen3Config", {"head_dim": 16}),
        "biases, window": Tiny(
            "Qwen3Config",
            ALL_SEEN
            | WINDOW
            | {"attention_bias": True, "use_sliding_window": True, "max_window_layers": 1},
        ),
        "tied, one kv head": Tiny("Qwen3Config", ONE_KV | {"tie_word_embeddings": True}),
    },
    "qwen3_moe": {
        "renormalised": Tiny("Qwen3MoeConfig", MOE | {"norm_topk_prob": True}),
        "not renormalised, some dense": Tiny(
            "Qwen3MoeConfig",
            MOE | ALL_SEEN | {"mlp_only_layers": [1], "tie_word_embeddings": True},
        ),
        "window": Tiny(
            "Qwen3MoeConfig",
            MOE | ONE_KV | WINDOW | {"use_sliding_window": True, "num_experts_per_tok": 3},
        ),
    },
    "gemma": {
        "grouped": Tiny("GemmaConfig", {"tie_word_embeddings": True}),
        "all kv, untied": Tiny("GemmaConfig", ALL_SEEN),
        "one kv head, biases": Tiny(
            "GemmaConfig", ONE_KV | {"tie_word_embeddings": True, "attention_bias": True}
        ),
    },
    "gemma2": {
        "caps": Tiny(
            "Gemma2Config",
            WINDOW | {"query_pre_attn_scalar": 32, "tie_word_embeddings": True},
        ),
        "tight caps, untied": Tiny(
            "Gemma2Config",
            ALL_SEEN | WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        ),
        "no caps": Tiny(
            "Gemma2Config",
            ONE_KV
            | WINDOW
            | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
            | {"head_dim": 16},
        ),
    },
    "gemma3_text": {
        "grouped": Tiny(
            "Gemma3TextConfig", WINDOW | {"sliding_window_pattern": 2, "tie_word_embeddings": True}
        ),
        "linear on full layers": Tiny(
            "Gemma3TextConfig",
            ALL_SEEN
            | WINDOW
            | {
                "sliding_window_pattern": 2,
                "rope_parameters": {
                    "full_attention": LINEAR | {"rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
        ),
        "one kv head": Tiny(
            "Gemma3TextConfig",
            ONE_KV | WINDOW | {"sliding_window_pattern": 2, "query_pre_attn_scalar": 64},
        ),
    },
    "phi3": {
        "all kv": Tiny("Phi3Config", ALL_SEEN),
        "longrope": Tiny(
            "Phi3Config",
            {"rope_parameters": LONG, "original_max_position_embeddings": 32},
        ),
        "partly rotated, window": Tiny(
            "Phi3Config",
            ONE_KV
            | WINDOW
            | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}}
            | {"tie_word_embeddings": True},
        ),
    },
    "opt": {
        "before": Tiny("OPTConfig", {}, OPT),
        "after, projected": Tiny(
            "OPTConfig", {"do_layer_norm_before": False, "word_embed_proj_dim": 48}, OPT
        ),
        "untied, gelu, no biases": Tiny(
            "OPTConfig",
            {"tie_word_embeddings": False, "activation_function": "gelu", "enable_bias": False},
            OPT,
        ),
    },
}
