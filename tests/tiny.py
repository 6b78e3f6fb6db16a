"""Tiny random Llamas, made and saved by transformers itself."""

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
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def make(folder: Path, *, seed: int = 0, eos_token_id=None, dtype=torch.float32, **facts):
    """Save a random Llama into ``folder`` and return it in float32. ``facts`` override the config.

    Weights are larger than transformers' default, so that a wrong sign or scale shows in the
    logits; biases and norms are random too.
    """
    defaults = dict(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos_token_id,
    )
    config = transformers.LlamaConfig(**(defaults | facts))
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    model.to(dtype).save_pretrained(folder)
    # Read back, not cast back: a cast would also have rounded the rotary frequencies.
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
