"""Qwen3: queries and keys are normalised head by head; heads of their own size."""

from tpjax.config import ModelConfig
from tpjax.models.common import ATTENTION, MLP, NORMS, QK_NORMS, biases, decoder, names, windows
from tpjax.models.registry import family


@family("qwen3", names=names(ATTENTION, MLP, NORMS, QK_NORMS))
def qwen3(hf: dict) -> ModelConfig:
    return decoder(hf, qk_norm=True, **biases(hf), **windows(hf, hf["sliding_window"]))
