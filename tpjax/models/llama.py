"""Llama 1, 2, 3, 3.1, 3.2 and models published in the same form."""

from tpjax.config import ModelConfig
from tpjax.models.common import ATTENTION, MLP, NORMS, biases, decoder, names
from tpjax.models.registry import family


@family("llama", names=names(ATTENTION, MLP, NORMS))
def llama(hf: dict) -> ModelConfig:
    return decoder(hf, mlp_bias=hf["mlp_bias"], **biases(hf))
