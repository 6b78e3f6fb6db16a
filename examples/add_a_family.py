"""A family tpjax does not know, StableLM, added in one function and compared with transformers.

pip install -e ".[test]" && python examples/add_a_family.py     (explained in add_a_family.md)
"""

import tempfile

import jax
import numpy as np
import torch
import transformers

import tpjax
from tpjax.config import ModelConfig
from tpjax.models.common import ATTENTION, MLP, NORMS, decoder, names, rope
from tpjax.models.registry import family


@family("stablelm", names=names(ATTENTION, MLP, NORMS))
def stablelm(hf: dict) -> ModelConfig:
    """Llama's blocks with LayerNorm, biases on queries, keys and values, heads rotated in part."""
    return decoder(
        hf,
        norm="layer",
        norm_eps=hf["layer_norm_eps"],
        qkv_bias=hf["use_qkv_bias"],
        rope=rope(hf["rope_parameters"], hf, partial=True),
    )


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 3)  # used where there are no accelerators
    config = transformers.StableLmConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_qkv_bias=True,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = transformers.StableLmForCausalLM(config).eval()
    prompt = list(range(1, 40))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        llm = tpjax.LLM(folder, tensor_parallel_size=3, max_model_len=128)
        theirs = model(torch.tensor([prompt])).logits[0].numpy()
        difference = np.abs(llm.logits(prompt) - theirs).max() / np.abs(theirs).max()
        print(f"largest difference of logits at tensor=3: {difference:.1e}")
        assert difference < 1e-4
        greedy = tpjax.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        print(llm.generate([prompt], greedy)[0].outputs[0].token_ids)


if __name__ == "__main__":
    main()
