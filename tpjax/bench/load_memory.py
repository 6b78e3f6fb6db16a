"""How much memory loading takes beyond the weights: a random checkpoint is written, then loaded.

    python -m tpjax.bench.load_memory -tp 4 --stored bfloat16 --dtype float32

Counts anonymous memory (RssAnon: the page cache of mapped files apart), sampled every few
milliseconds by a thread, against what the process used just before loading. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tpjax import env

SHAPE = dict(
    model_type="llama",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    rope_theta=10000.0,
)


def write_checkpoint(folder: Path, stored: str, seed: int = 0) -> int:
    """A sharded Llama of random weights, with one tensor of 131 million elements and a head of as
    many; returns its parameters. About 1.0 GB in bfloat16."""
    from tpjax.checkpoint.folder import read_folder
    from tpjax.parallel.mesh import make_mesh
    from tpjax.plan import Plan
    from tpjax.weights import WeightTable

    (folder / "config.json").write_text(json.dumps(SHAPE | {"dtype": stored}))
    model = read_folder(folder)
    table = WeightTable(model.config, Plan(mesh=make_mesh()))
    dtype = np.dtype(stored) if stored != "bfloat16" else np.dtype(ml_dtypes.bfloat16)
    block = np.random.default_rng(seed).normal(0, 0.02, 1 << 20).astype(dtype)
    where = {}
    for spec in table.specs:
        name = model.family.name(spec.path)
        where[name] = f"model-{len(where):05}.safetensors"
        save_file({name: np.resize(block, spec.stored)}, folder / where[name])
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return table.parameters


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


class Peak:
    """The highest RssAnon while the block runs."""

    def __enter__(self):
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.003):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())


def measure(folder: Path, tensor: int, dtype: str) -> dict:
    """Load once and compare the peak with the weights' own bytes."""
    import tpjax
    from tpjax.checkpoint.folder import bundled

    # The small model first, so that importing libraries is not counted as loading.
    tpjax.LLM(bundled(), tensor, dtype=dtype, max_num_seqs=1, say=lambda line: None)
    before = anonymous_bytes()
    with Peak() as peak:
        started = time.perf_counter()
        llm = tpjax.LLM(folder, tensor, dtype=dtype, max_num_seqs=1, say=lambda line: None)
        seconds = time.perf_counter() - started
    weights = sum(leaf.nbytes for leaf in llm.weights)
    return {
        "tensor": tensor,
        "dtype": dtype,
        "weights_bytes": weights,
        "peak_bytes": peak.bytes - before,
        "beyond_weights_bytes": peak.bytes - before - weights,
        "load_s": round(seconds, 2),
        "GB_per_s": round(weights / seconds / 1e9, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-tp", type=int, default=4)
    parser.add_argument("--stored", default="bfloat16")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--write", type=Path, help="only write the checkpoint there")
    parser.add_argument("--model", type=Path, help="load this one instead of a random one")
    args = parser.parse_args()
    env.start(devices=args.tp)
    if args.write:
        write_checkpoint(args.write, args.stored)
        return 0
    if args.model:
        print(json.dumps(measure(args.model, args.tp, args.dtype)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        # In another process: memory freed here could be used again, and not be counted.
        write = ("--write", folder, "--stored", args.stored)
        subprocess.run([sys.executable, "-m", "tpjax.bench.load_memory", *write], check=True)
        print(json.dumps(measure(Path(folder), args.tp, args.dtype)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
