"""transformers as most people run it: eager, its own `generate`, all cores or the first GPU. A peer
of `tpjax bench decode`, in a process of its own."""

import argparse
import json
import sys
import time
from typing import Any

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser()
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a folder or a hub id")
    source.add_argument("--config", help="a config.json, with random weights")
    parser.add_argument("--dtype", required=True)
    for name in ("--batch", "--prompt-length", "--max-tokens"):
        parser.add_argument(name, type=int, required=True)
    args = parser.parse_args()
    model = load(args)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.prompt_length))
    ids = ids.to(next(model.parameters()).device)

    @torch.inference_mode()
    def run(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        ).cpu()
        return time.perf_counter() - start

    run(2)
    about = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"about": about}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"one": run(1), "all": run(args.max_tokens + 1)}), flush=True)


def load(args: argparse.Namespace) -> Any:
    """The model; with a config alone it has random weights."""
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, args.dtype)
    if args.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        config = transformers.AutoConfig.from_pretrained(args.config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu").eval()


if __name__ == "__main__":
    main()
