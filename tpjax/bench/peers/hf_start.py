"""transformers from a process's start to its first token: a peer of `tpjax bench start`."""

import argparse
from typing import Any

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser()
    for word in ("--model", "--prompt", "--dtype"):
        parser.add_argument(word, required=True)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = model.to(place), tokenizer(args.prompt, return_tensors="pt").to(place)
    made = model.generate(**ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    print(repr(tokenizer.decode(made[0, -1:])), flush=True)


if __name__ == "__main__":
    main()
