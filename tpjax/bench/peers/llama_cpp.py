"""llama.cpp on all cores, through llama-cpp-python: a peer of `tpjax bench decode`, in a process of
its own. Llamas only; of the shape that is given, always with random weights.

Made fit for the machine by ``CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf``.
"""

import ctypes
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tpjax.bench.peers.side import answer, arguments

# Optional installs, which type checkers need not have.
gguf: Any = importlib.import_module("gguf")
llama_cpp: Any = importlib.import_module("llama_cpp")

TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}


def write(config: dict, dtype: str, file: Path) -> None:
    """A model of this shape, every matrix one random block over and over."""
    heads = config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    embed, hidden = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or embed // heads
    out = gguf.GGUFWriter(file, "llama")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(embed)
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(hidden)
    out.add_head_count(heads)
    out.add_head_count_kv(kv)
    out.add_key_length(head)
    out.add_value_length(head)
    out.add_rope_dimension_count(head)
    rope = config.get("rope_parameters") or {}
    out.add_rope_freq_base(float(config.get("rope_theta") or rope.get("rope_theta") or 1e4))
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_vocab_size(config["vocab_size"])
    out.add_tokenizer_model("no_vocab")
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * np.float32(0.02)
    kind = TYPES[dtype]
    stored = gguf.quants.quantize(block.reshape(1024, 1024), kind).reshape(-1)

    def matrix(name: str, rows: int, columns: int) -> None:
        width = columns * stored.nbytes // block.size // stored.itemsize
        out.add_tensor(name, np.resize(stored, (rows, width)), raw_dtype=kind)

    def norm(name: str) -> None:
        out.add_tensor(name, np.ones(embed, np.float32))

    matrix("token_embd.weight", config["vocab_size"], embed)
    if not config.get("tie_word_embeddings"):
        matrix("output.weight", config["vocab_size"], embed)
    norm("output_norm.weight")
    for n in range(config["num_hidden_layers"]):
        norm(f"blk.{n}.attn_norm.weight")
        norm(f"blk.{n}.ffn_norm.weight")
        matrix(f"blk.{n}.attn_q.weight", heads * head, embed)
        matrix(f"blk.{n}.attn_k.weight", kv * head, embed)
        matrix(f"blk.{n}.attn_v.weight", kv * head, embed)
        matrix(f"blk.{n}.attn_output.weight", embed, heads * head)
        matrix(f"blk.{n}.ffn_gate.weight", hidden, embed)
        matrix(f"blk.{n}.ffn_up.weight", hidden, embed)
        matrix(f"blk.{n}.ffn_down.weight", embed, hidden)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


class Model:
    """A loaded file, and sequences of tokens through it."""

    def __init__(self, file: Path, rows: int, positions: int):
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        about = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), about)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        asked = llama_cpp.llama_context_default_params()
        asked.n_ctx = rows * positions
        asked.n_batch = asked.n_ubatch = 512
        asked.n_seq_max = rows
        asked.n_threads = asked.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = llama_cpp.llama_init_from_model(model, asked)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def append(self, tokens, positions, rows, last: int) -> list[int]:
        """Tokens of sequences at positions; what follows the ``last`` ones most likely."""
        for start in range(0, len(tokens), 512):
            size = min(512, len(tokens) - start)
            batch = llama_cpp.llama_batch_init(size, 0, 1)
            batch.n_tokens = size
            for i in range(size):
                at = start + i
                batch.token[i], batch.pos[i] = int(tokens[at]), int(positions[at])
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, int(rows[at])
                batch.logits[i] = at >= len(tokens) - last
            if failed := llama_cpp.llama_decode(self.context, batch):
                sys.exit(f"llama_decode: {failed}")
            llama_cpp.llama_batch_free(batch)
        return [self._best(i - last) for i in range(last)]

    def _best(self, i: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, i)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())


def main() -> None:
    args = arguments().parse_args()
    path = Path(args.config) if args.config else Path(args.model) / "config.json"
    config = json.loads(path.read_text())
    if config["model_type"] != "llama":
        sys.exit(f"{path}: this runner knows Llamas, not model_type {config['model_type']!r}")
    B, T = args.batch, args.prompt_length
    with tempfile.TemporaryDirectory(prefix="tpjax-peer-") as folder:
        write(config, args.dtype, Path(folder) / "model.gguf")
        model = Model(Path(folder) / "model.gguf", B, T + args.max_tokens + 8)
    prompts = np.random.default_rng(0).integers(0, config["vocab_size"], (B, T))

    def run(tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        model.clear()
        new = [model.append(prompts[b], range(T), [b] * T, 1)[0] for b in range(B)]
        first = time.perf_counter()
        for n in range(tokens - 1):
            new = model.append(new, [T + n] * B, range(B), B)
        return first - start, time.perf_counter() - first

    run(2)
    answer(f"llama-cpp-python {llama_cpp.__version__}, random weights", run, args.max_tokens)


if __name__ == "__main__":
    main()
