"""OPT: LayerNorm, learned positions that start at row 2, an MLP without a gate, biases everywhere.
The 350m normalises after each block, and its embedding is narrower than the rest."""

from tpjax.config import ModelConfig
from tpjax.errors import CheckpointError
from tpjax.models.common import act, names
from tpjax.models.registry import family

OFFSET = 2
LAYER = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.out_proj",
    "attn_norm": "self_attn_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
    "mlp_norm": "final_layer_norm",
}
NAMES = names(LAYER, layers="model.decoder.layers") | {
    "embed.w": "model.decoder.embed_tokens.weight",
    "positions": "model.decoder.embed_positions.weight",
    "project_in.w": "model.decoder.project_in.weight",
    "project_out.w": "model.decoder.project_out.weight",
    "norm.w": "model.decoder.final_layer_norm.weight",
    "norm.b": "model.decoder.final_layer_norm.bias",
}


@family("opt", names=NAMES, roots=("model.decoder.", "decoder."))
def opt(hf: dict) -> ModelConfig:
    if not hf["layer_norm_elementwise_affine"]:
        raise CheckpointError("layer_norm_elementwise_affine=false: OPT here has weights in norms")
    embed, heads, width = hf["hidden_size"], hf["num_attention_heads"], hf["word_embed_proj_dim"]
    before, bias = hf["do_layer_norm_before"], hf["enable_bias"]
    return ModelConfig(
        family="opt",
        vocab=hf["vocab_size"],
        embed=embed,
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=embed // heads,
        mlp=hf["ffn_dim"],
        max_position=hf["max_position_embeddings"],
        norm="layer",
        norm_eps=1e-5,
        norm_place="before" if before else "after",
        final_norm=before and not hf["_remove_final_layer_norm"],
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        act=act(hf["activation_function"]),
        gated=False,
        tie_embeddings=hf["tie_word_embeddings"],
        embed_in=width if width != embed else 0,
        learned_positions=hf["max_position_embeddings"] + OFFSET,
        position_offset=OFFSET,
        rope=None,
    )
