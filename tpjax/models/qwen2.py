"""Qwen2 and Qwen2.5: biases on queries, keys and values only; windows in the upper layers."""

from tpjax.config import ModelConfig
from tpjax.models.common import ATTENTION, MLP, NORMS, decoder, names, windows
from tpjax.models.registry import family


@family("qwen2", names=names(ATTENTION, MLP, NORMS))
def qwen2(hf: dict) -> ModelConfig:
    return decoder(hf, qkv_bias=True, o_bias=False, **windows(hf, hf["sliding_window"]))
