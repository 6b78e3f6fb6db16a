"""What families have in common: words of Hugging Face configs, and names of weights."""

from typing import Any

from tpjax.config import ModelConfig
from tpjax.errors import CheckpointError
from tpjax.rope import Rope, longrope_scale, yarn_scale

ATTENTION = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
}
MLP = {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
QK_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}

ACTS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def names(*layer: dict[str, str], layers: str = "model.layers") -> dict[str, str]:
    """Our paths -> checkpoint names: the embedding, final norm and head as nearly all have them,
    and weight and bias of what these tables list for every layer."""
    out = {
        "embed.w": "model.embed_tokens.weight",
        "norm.w": "model.norm.weight",
        "norm.b": "model.norm.bias",
        "head": "lm_head.weight",
    }
    for table in layer:
        for ours, theirs in table.items():
            out[f"blocks.{{layer}}.{ours}.w"] = f"{layers}.{{layer}}.{theirs}.weight"
            out[f"blocks.{{layer}}.{ours}.b"] = f"{layers}.{{layer}}.{theirs}.bias"
    return out


def experts(router: str, gate: str, up: str, down: str) -> dict[str, str]:
    """Names of a layer's router and experts; ``{expert}`` stands for the expert's number."""
    inside = {"router": router, "gate": gate, "up": up, "down": down}
    return {
        f"blocks.{{layer}}.moe.{ours}": f"model.layers.{{layer}}.{theirs}.weight"
        for ours, theirs in inside.items()
    }


def decoder(hf: dict, **more: Any) -> ModelConfig:
    """The facts that most families say in the same words, and ``more`` of them, which win."""
    if hf.get("use_bidirectional_attention"):
        raise CheckpointError("use_bidirectional_attention: only causal models run here")
    heads = hf["num_attention_heads"]
    facts: dict[str, Any] = dict(
        family=hf["model_type"],
        vocab=hf["vocab_size"],
        embed=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp=hf["intermediate_size"],
        max_position=extended(hf),
        norm_eps=hf.get("rms_norm_eps", 0.0),
        act=more["act"] if "act" in more else act(hf["hidden_act"]),
        tie_embeddings=hf["tie_word_embeddings"],
    )
    if "rope" not in more:
        facts["rope"] = rope(hf["rope_parameters"], hf)
    return ModelConfig(**facts | more)


def biases(hf: dict) -> dict[str, Any]:
    """Whether attention has biases, in families where a config may say so."""
    return {"qkv_bias": hf["attention_bias"], "o_bias": hf["attention_bias"]}


def act(name: str) -> Any:
    """Our word for an activation; raises CheckpointError for one that no model here has."""
    if name not in ACTS:
        raise CheckpointError(f"activation {name!r}: known here are {', '.join(ACTS)}")
    return ACTS[name]


def windows(hf: dict, window: int | None, *, by_layer: bool = True) -> dict[str, Any]:
    """``window`` and which layers have it: ``by_layer``, as ``layer_types`` say, or all."""
    types = hf.get("layer_types") if by_layer else None
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * hf["num_hidden_layers"]
    if unknown := set(types) - {"sliding_attention", "full_attention"}:
        raise CheckpointError(f"layer_types {sorted(unknown)}: not known here")
    local = tuple(kind == "sliding_attention" for kind in types)
    return {"window": window or None, "local_layers": local} if any(local) else {}


def extended(hf: dict) -> int:
    """Positions a model reaches with its rope scaled: configs give the length before that."""
    length, about = hf["max_position_embeddings"], hf.get("rope_parameters") or {}
    factor = about.get("factor") or 1.0
    match about.get("rope_type"):
        case "linear" | "dynamic":
            return int(length * factor)
        case "yarn":
            return max(length, int(about["original_max_position_embeddings"] * factor))
    return length


def rope(about: dict, hf: dict, *, partial: bool = False, anew: bool = False) -> Rope:
    """Rope facts from transformers' normalised ``rope_parameters``. ``partial``: whether the family
    can rotate a part of every head; ``anew``: whether it rotates all positions anew when a sequence
    outgrows a longrope."""
    kind = about.get("rope_type", "default")
    longest = hf["max_position_embeddings"]
    original = about.get("original_max_position_embeddings") or longest
    words: dict[str, Any] = {"kind": kind, "theta": float(about["rope_theta"])}
    if (rotated := about.get("partial_rotary_factor")) not in (None, 1.0):
        if not partial:
            raise CheckpointError(f"partial_rotary_factor: {hf['model_type']} rotates whole heads")
        words["rotated"] = float(rotated)
    if kind == "longrope" and not anew:
        raise CheckpointError(f"rope_type='longrope': known for phi3, not for {hf['model_type']}")
    match kind:
        case "default":
            return Rope(**words)
        case "linear":
            return Rope(factor=float(about["factor"]), **words)
        case "dynamic":
            return Rope(factor=float(about["factor"]), original_max_position=longest, **words)
        case "llama3":
            return Rope(
                factor=float(about["factor"]),
                low_freq_factor=float(about["low_freq_factor"]),
                high_freq_factor=float(about["high_freq_factor"]),
                original_max_position=original,
                **words,
            )
        case "yarn":
            factor = float(about.get("factor") or longest / original)
            return Rope(
                factor=factor,
                scale=_yarn_scale(about, factor),
                original_max_position=original,
                beta_fast=float(about.get("beta_fast") or 32),
                beta_slow=float(about.get("beta_slow") or 1),
                truncate=about.get("truncate", True),
                **words,
            )
        case "longrope":
            original = hf.get("original_max_position_embeddings") or original
            scale = about.get("attention_factor")
            if scale is None:
                scale = longrope_scale(float(about.get("factor") or longest / original), original)
            return Rope(
                scale=float(scale),
                original_max_position=original,
                short_factor=tuple(map(float, about["short_factor"])),
                long_factor=tuple(map(float, about["long_factor"])),
                **words,
            )
    raise CheckpointError(
        f"rope_type={kind!r}: known here are default, linear, dynamic, llama3, yarn, longrope"
    )


def _yarn_scale(about: dict, factor: float) -> float:
    if about.get("attention_factor") is not None:
        return float(about["attention_factor"])
    mscale, of_all = about.get("mscale"), about.get("mscale_all_dim")
    if mscale and of_all:
        return yarn_scale(factor, mscale) / yarn_scale(factor, of_all)
    return yarn_scale(factor)
