"""Mixtral 8x7B and 8x22B: every layer has experts, two of which each token goes to."""

from tpjax.config import ModelConfig, MoE
from tpjax.models.common import ATTENTION, NORMS, decoder, experts, names, windows
from tpjax.models.registry import family

EXPERT = "block_sparse_moe.experts.{expert}"
NAMES = names(ATTENTION, NORMS) | experts(
    "block_sparse_moe.gate", f"{EXPERT}.w1", f"{EXPERT}.w3", f"{EXPERT}.w2"
)


@family("mixtral", names=NAMES)
def mixtral(hf: dict) -> ModelConfig:
    moe = MoE(
        experts=hf["num_local_experts"],
        per_token=hf["num_experts_per_tok"],
        mlp=hf["intermediate_size"],
        layers=(True,) * hf["num_hidden_layers"],
    )
    return decoder(hf, moe=moe, **windows(hf, hf["sliding_window"], by_layer=False))
