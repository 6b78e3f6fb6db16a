"""Qwen1.5-MoE and Qwen2-MoE: experts in some layers, with one more that every token goes to."""

from tpjax.config import ModelConfig, MoE
from tpjax.models.common import ATTENTION, MLP, NORMS, decoder, experts, names, windows
from tpjax.models.registry import family

EXPERT = "mlp.experts.{expert}"
EXPERTS = experts("mlp.gate", f"{EXPERT}.gate_proj", f"{EXPERT}.up_proj", f"{EXPERT}.down_proj")
SHARED = {
    "moe.shared.gate": "mlp.shared_expert.gate_proj",
    "moe.shared.up": "mlp.shared_expert.up_proj",
    "moe.shared.down": "mlp.shared_expert.down_proj",
    "moe.shared_gate": "mlp.shared_expert_gate",
}


def moe(hf: dict) -> MoE:
    """The experts of Qwen's mixtures, and the layers that have them."""
    dense, step = hf["mlp_only_layers"] or (), hf["decoder_sparse_step"]
    return MoE(
        experts=hf.get("num_experts") or hf["num_local_experts"],
        per_token=hf["num_experts_per_tok"],
        mlp=hf["moe_intermediate_size"],
        renormalise=hf["norm_topk_prob"],
        shared_mlp=hf.get("shared_expert_intermediate_size", 0),
        layers=tuple(
            n not in dense and (n + 1) % step == 0 for n in range(hf["num_hidden_layers"])
        ),
    )


@family("qwen2_moe", names=names(ATTENTION, MLP, NORMS, SHARED) | EXPERTS)
def qwen2_moe(hf: dict) -> ModelConfig:
    biases = {"qkv_bias": hf["qkv_bias"], "o_bias": False}
    return decoder(hf, moe=moe(hf), **biases, **windows(hf, hf["sliding_window"]))
