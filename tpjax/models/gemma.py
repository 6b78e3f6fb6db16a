"""Gemma 1, 2 and 3 (text): norms times 1 + weight, a scaled embedding; the later ones normalise
around every block, cap logits (2), and mix windows with layers that see everything."""

from typing import Any

from tpjax.config import ModelConfig
from tpjax.models.common import (
    ATTENTION,
    MLP,
    NORMS,
    QK_NORMS,
    act,
    biases,
    decoder,
    names,
    rope,
    windows,
)
from tpjax.models.registry import family

AROUND = {
    "attn_norm": "input_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
NAMES_3 = names(ATTENTION, MLP, AROUND, QK_NORMS)
# What a multimodal folder's text part is called: in published files, and as saved today.
ROOTS = ("model.", "language_model.model.", "model.language_model.")
OTHER_PARTS = (r"^(model\.)?(vision_tower|multi_modal_projector)\.",)


def every(hf: dict, **more: Any) -> ModelConfig:
    """What all three are."""
    scale = float(hf["hidden_size"]) ** 0.5
    return decoder(hf, norm_offset=1.0, embed_scale=scale, **biases(hf), **more)


def later(hf: dict, **more: Any) -> ModelConfig:
    """What the second and the third are."""
    return every(
        hf,
        act=act(hf["hidden_activation"]),
        norm_place="around",
        attn_scale=float(hf["query_pre_attn_scalar"]) ** -0.5,
        attn_softcap=hf["attn_logit_softcapping"],
        final_softcap=hf["final_logit_softcapping"],
        **windows(hf, hf["sliding_window"]),
        **more,
    )


@family("gemma", names=names(ATTENTION, MLP, NORMS))
def gemma(hf: dict) -> ModelConfig:
    return every(hf)


@family("gemma2", names=names(ATTENTION, MLP, AROUND))
def gemma2(hf: dict) -> ModelConfig:
    return later(hf)


@family("gemma3_text", names=NAMES_3)
def gemma3_text(hf: dict) -> ModelConfig:
    full, local = (
        rope(hf["rope_parameters"][kind], hf) for kind in ("full_attention", "sliding_attention")
    )
    length = hf["max_position_embeddings"]  # as it is with the rope scaled
    hf = hf | {"rope_parameters": {}}
    return later(hf, qk_norm=True, rope=full, rope_local=local, max_position=length)


@family("gemma3", names=NAMES_3, roots=ROOTS, ignored=OTHER_PARTS)
def gemma3(hf: dict) -> ModelConfig:
    """The text part of a multimodal checkpoint."""
    return gemma3_text(hf["text_config"] | {"tie_word_embeddings": hf["tie_word_embeddings"]})
