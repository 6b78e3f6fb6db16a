"""A random Llama of any size as a Hugging Face folder, for measuring: sharded, with an index."""

import argparse
import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tpjax import env
from tpjax.checkpoint.folder import model_config
from tpjax.models import find
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan
from tpjax.weights import WeightTable

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SMALL = {  # 8 MB a layer, 17 MB more
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
}
_BLOCK = 1_048_573  # a prime number of values is repeated: no two places of a weight line up


def write(folder: Path, layers: int, shards: int, dtype: str = "bfloat16", **facts) -> int:
    """Write the model; returns its bytes. A shard is in memory at a time."""
    about = SHAPE | {"num_hidden_layers": layers, "dtype": dtype} | facts
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about))
    config, _ = model_config(about, "synthetic")
    specs = WeightTable(config, Plan(mesh=make_mesh())).specs
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    total = sum(spec.bytes // spec.dtype.itemsize * kind.itemsize for spec in specs)
    random = np.random.default_rng(0)
    name, where, shard, held = find("llama", "synthetic").name, {}, {}, 0

    def flush() -> None:
        nonlocal shard, held
        file = f"model-{len(set(where.values())):05}.safetensors"
        save_file(shard, folder / file)
        shard, held = {}, 0

    for spec in specs:
        block = random.normal(0, 0.02, _BLOCK).astype(kind)
        shard[name(spec.path)] = np.resize(block, spec.stored)
        where[name(spec.path)] = f"model-{len(set(where.values())) + (not held):05}.safetensors"
        held += shard[name(spec.path)].nbytes
        if held >= total / shards / 1.25:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where})
    )
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=14, help="0.44 GB each; default: %(default)s")
    parser.add_argument("--shards", type=int, default=8, help="at least; default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--small", action="store_true", help="8 MB a layer, and 17 MB")
    args = parser.parse_args()
    env.start(1)
    print(write(args.folder, args.layers, args.shards, args.dtype, **(SMALL if args.small else {})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
