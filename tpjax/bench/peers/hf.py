"""transformers as most people run it: eager, its own `generate`, all cores or the first GPU. A peer
of `tpjax bench decode`, in a process of its own.

``--compile``: a cache of fixed size and a compiled forward pass. ``--tensor``: one of the processes
torchrun starts, each with its part of every layer (``tp_plan="auto"``).
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from tpjax.bench.peers.side import answer, arguments


def main() -> None:
    parser = arguments()
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tensor", action="store_true")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model = distributed(args) if args.tensor else load(args)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.prompt_length))
    ids = ids.to(next(model.parameters()).device)
    more: dict[str, Any] = {}
    if args.compile:
        model.forward = torch.compile(model.forward, dynamic=False)
        more = {"cache_implementation": "static", "disable_compile": True}

    @torch.inference_mode()
    def run(tokens: int) -> tuple[float, float]:
        at: list[float] = []

        def look(ids, scores, **unused):  # asked after every token whether to stop
            if not at:
                at.append(_now(ids))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        start = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[look],
            **more,
        )
        return at[0] - start, _now(made) - at[0]

    run(2)
    if args.compile:  # the cache is as large as what is asked for, and compiled for
        run(args.max_tokens + 1)
    about = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if not args.tensor:
        answer(about, run, args.max_tokens)
        return
    about += f", {torch.distributed.get_world_size()} processes"
    if torch.distributed.get_rank() == 0:
        answer(about, run, args.max_tokens, told_to_all(sys.stdin))
    else:
        for _ in told():
            run(args.max_tokens + 1)


def _now(x: torch.Tensor) -> float:
    """When ``x`` is there."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def load(args) -> Any:
    """The model; with a config alone it has random weights."""
    dtype = getattr(torch, args.dtype)
    if args.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        config = transformers.AutoConfig.from_pretrained(args.config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu").eval()


def distributed(args) -> Any:
    """This process's part of the model, which has to come from files."""
    torch.distributed.init_process_group()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // torch.distributed.get_world_size()))
    with contextlib.ExitStack() as stack:
        folder = [args.model]
        if not args.model and torch.distributed.get_rank() == 0:
            folder = [stack.enter_context(tempfile.TemporaryDirectory(prefix="tpjax-peer-"))]
            load(args).save_pretrained(folder[0])
        torch.distributed.broadcast_object_list(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder[0], dtype=getattr(torch, args.dtype), tp_plan="auto"
        )
        torch.distributed.barrier()  # before the files are removed
    return model.eval()


def told_to_all(lines) -> Iterator[None]:
    """A round for every line, in all processes; then their end."""
    for _ in lines:
        torch.distributed.broadcast(torch.ones(1), 0)
        yield
    torch.distributed.broadcast(torch.zeros(1), 0)


def told() -> Iterator[None]:
    """The same in the others."""
    going = torch.ones(1)
    while True:
        torch.distributed.broadcast(going, 0)
        if not going.item():
            return
        yield


if __name__ == "__main__":
    main()
