"""Phi-3, 3.5 and 4: queries, keys and values are one tensor on disk, gate and up another; longrope;
heads that are rotated in part (Phi-4-mini)."""

from tpjax.config import ModelConfig
from tpjax.models.common import NORMS, decoder, names, rope, windows
from tpjax.models.registry import family

FUSED = {
    "attn.q": "self_attn.qkv_proj",
    "attn.k": "self_attn.qkv_proj",
    "attn.v": "self_attn.qkv_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_up_proj",
    "mlp.up": "mlp.gate_up_proj",
    "mlp.down": "mlp.down_proj",
}


@family("phi3", names=names(FUSED, NORMS))
def phi3(hf: dict) -> ModelConfig:
    turning = rope(hf["rope_parameters"], hf, partial=True, anew=True)
    return decoder(hf, rope=turning, **windows(hf, hf["sliding_window"], by_layer=False))
