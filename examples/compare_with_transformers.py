"""Decode and prefill beside transformers: same shape, same machine, same run, round by round.

    pip install torch
    python examples/compare_with_transformers.py --config config.json --rounds 3

Every case is its own process with random weights; the rounds go A B C A B C, so that a machine that
is slow for a minute is slow for all. The ratio is taken round by round, against transformers in the
same dtype. transformers runs eager on all cores. Prints Markdown.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from tqdm import tqdm


def measure_transformers(args: argparse.Namespace) -> dict:
    """The same quantities as ``tpjax bench decode``, measured the same way."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(args.config)
    dtype = getattr(torch, args.dtype)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
        rotary = model.model.rotary_emb
        rotary.inv_freq = rotary.original_inv_freq = torch.linspace(1, 1e-4, config.head_dim // 2)
        ids = torch.randint(0, config.vocab_size, (args.batch, args.prompt_length))
        mask = torch.ones_like(ids)

        def run(tokens: int) -> float:
            start = time.perf_counter()
            model.eval().generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
            return time.perf_counter() - start

        run(2)
        first, decode = [], []
        for _ in range(5):
            first.append(run(1))
            decode.append(run(args.max_tokens + 1) - first[-1])
    return {
        "prefill_tok_s": args.batch * args.prompt_length / statistics.median(first),
        "decode_tok_s": args.batch * args.max_tokens / statistics.median(decode),
    }


def case(args: argparse.Namespace, dtype: str, tensor: int | None, record: bool) -> dict:
    """One process: transformers if ``tensor`` is None, else tpjax on that many devices."""
    shape = ["--batch", args.batch, "--prompt-length", args.prompt_length]
    shape += ["--max-tokens", args.max_tokens, "--dtype", dtype, "--config", args.config]
    if tensor is None:
        command = [__file__, "--peer", *shape]
    else:
        command = ["-m", "tpjax.cli", "bench", "decode", "--json", "--quiet", "-tp", tensor, *shape]
        command += ["--record"] if record else []
    done = subprocess.run(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tensor", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--record", action="store_true", help="tpjax's rows into BENCHMARKS.md")
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        print(json.dumps(measure_transformers(args)))
        return
    cases = [(dtype, tensor) for dtype in args.dtypes for tensor in [None, *args.tensor]]
    results: dict[tuple, list[dict]] = {c: [] for c in cases}
    with tqdm(total=len(cases) * args.rounds, unit=" runs") as bar:
        for number in range(args.rounds):
            for dtype, tensor in cases:
                results[dtype, tensor].append(
                    case(args, dtype, tensor, record=args.record and number == 0)
                )
                bar.update()
    print("| dtype | system | decode tok/s (spread) | ratio | prefill tok/s (spread) | ratio |")
    print("|---|---|---|---|---|---|")
    for (dtype, tensor), runs in results.items():
        system = "transformers" if tensor is None else f"tpjax, tensor={tensor}"
        cells = [dtype, system]
        for name in ("decode_tok_s", "prefill_tok_s"):
            values = [run[name] for run in runs]
            peers = [run[name] for run in results[dtype, None]]
            ratio = statistics.median(v / p for v, p in zip(values, peers, strict=True))
            middle = statistics.median(values)
            cells += [f"{middle:.1f} ({min(values):.1f} to {max(values):.1f})", f"{ratio:.2f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
