"""Llama 1, 2, 3, 3.1, 3.2 and models published in the same form."""

from tpjax.config import ModelConfig, Rope
from tpjax.errors import CheckpointError
from tpjax.models.registry import family

NAMES = {
    "embed.w": "model.embed_tokens.weight",
    "norm.w": "model.norm.weight",
    "head": "lm_head.weight",
    "blocks.{layer}.attn_norm.w": "model.layers.{layer}.input_layernorm.weight",
    "blocks.{layer}.mlp_norm.w": "model.layers.{layer}.post_attention_layernorm.weight",
}
for _ours, _theirs in {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}.items():
    NAMES[f"blocks.{{layer}}.{_ours}.w"] = f"model.layers.{{layer}}.{_theirs}.weight"
    NAMES[f"blocks.{{layer}}.{_ours}.b"] = f"model.layers.{{layer}}.{_theirs}.bias"


@family("llama", names=NAMES, ignored=(".rotary_emb.inv_freq",))
def llama(hf: dict) -> ModelConfig:
    if hf["hidden_act"] != "silu":
        raise CheckpointError(f"hidden_act={hf['hidden_act']!r}: llama models here use 'silu'")
    return ModelConfig(
        family="llama",
        vocab=hf["vocab_size"],
        embed=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        mlp=hf["intermediate_size"],
        norm_eps=hf["rms_norm_eps"],
        attn_bias=hf["attention_bias"],
        mlp_bias=hf["mlp_bias"],
        tie_embeddings=hf["tie_word_embeddings"],
        rope=rope(hf["rope_parameters"]),
        max_position=hf["max_position_embeddings"],
    )


def rope(parameters: dict) -> Rope:
    """Rope facts from transformers' normalised ``rope_parameters``."""
    kind = parameters.get("rope_type", "default")
    theta = float(parameters["rope_theta"])
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor: llama models here rotate whole heads")
    match kind:
        case "default":
            return Rope(theta=theta)
        case "linear":
            return Rope(theta=theta, kind="linear", factor=float(parameters["factor"]))
        case "llama3":
            return Rope(
                theta=theta,
                kind="llama3",
                factor=float(parameters["factor"]),
                low_freq_factor=float(parameters["low_freq_factor"]),
                high_freq_factor=float(parameters["high_freq_factor"]),
                original_max_position=parameters["original_max_position_embeddings"],
            )
    raise CheckpointError(f"rope_type={kind!r}: known here are default, linear, llama3")
