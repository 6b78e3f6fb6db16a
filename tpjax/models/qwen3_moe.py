"""Qwen3-MoE: Qwen3's attention, and experts in some layers or all."""

from tpjax.config import ModelConfig
from tpjax.models.common import ATTENTION, MLP, NORMS, QK_NORMS, biases, decoder, names, windows
from tpjax.models.qwen2_moe import EXPERTS, moe
from tpjax.models.registry import family


@family("qwen3_moe", names=names(ATTENTION, MLP, NORMS, QK_NORMS) | EXPERTS)
def qwen3_moe(hf: dict) -> ModelConfig:
    window = windows(hf, hf["sliding_window"], by_layer=False)
    return decoder(hf, qk_norm=True, moe=moe(hf), **biases(hf), **window)
