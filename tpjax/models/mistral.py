"""Mistral 7B (with its window), Nemo (heads of their own size), Small and Large."""

from tpjax.config import ModelConfig
from tpjax.models.common import ATTENTION, MLP, NORMS, decoder, names, windows
from tpjax.models.registry import family


@family("mistral", names=names(ATTENTION, MLP, NORMS))
def mistral(hf: dict) -> ModelConfig:
    return decoder(hf, **windows(hf, hf["sliding_window"]))
