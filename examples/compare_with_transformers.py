"""Decode and prefill beside transformers: same shape, same machine, same rounds.

    pip install torch
    python examples/compare_with_transformers.py --config config.json

One `tpjax bench decode --compare hf` for every dtype and number of devices: both systems with
random weights, rounds A B A B, the ratio taken round by round. Prints Markdown.
"""

import argparse
import json
import subprocess
import sys

from tqdm import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tensor", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--record", action="store_true", help="tpjax's rows into BENCHMARKS.md")
    args = parser.parse_args()
    shape = ["--config", args.config, "--batch", args.batch, "--prompt-length", args.prompt_length]
    shape += ["--max-tokens", args.max_tokens, "--rounds", args.rounds, "--compare", "hf"]
    shape += ["--record"] if args.record else []
    print("| dtype | devices | tpjax decode tok/s | transformers | ratio (spread)", end="")
    print(" | tpjax prefill tok/s | transformers | ratio (spread) | read bandwidth |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for dtype, tensor in tqdm([(d, t) for d in args.dtypes for t in args.tensor], unit=" cases"):
        command = ["-m", "tpjax.cli", "bench", "decode", "--json", "--quiet", *shape]
        command = [sys.executable, *map(str, [*command, "--dtype", dtype, "-tp", tensor])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        ours = json.loads(done.stdout.splitlines()[-1])
        peer = ours["peers"]["hf"]
        cells = [dtype, f"{tensor}"]
        for kind in ("decode", "prefill"):
            least, median, most = peer[f"{kind}_ratio"]
            cells += [f"{x[f'{kind}_tok_s']:.1f}" for x in (ours, peer)]
            cells.append(f"{median:.2f} ({least:.2f} to {most:.2f})")
        share = f"{ours['read_bandwidth'] / 1e9:.0f} GB/s, {ours['read_bandwidth_share']:.0%}"
        print("| " + " | ".join([*cells, share]) + " |", flush=True)


if __name__ == "__main__":
    main()
