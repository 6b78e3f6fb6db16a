"""The peer's side of `tpjax.bench.peers`: what it is asked for, and its answers."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable


def arguments() -> argparse.ArgumentParser:
    """What every peer is told."""
    parser = argparse.ArgumentParser()
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a folder or a hub id")
    source.add_argument("--config", help="a config.json, with random weights")
    parser.add_argument("--dtype", required=True)
    for name in ("--batch", "--prompt-length", "--max-tokens"):
        parser.add_argument(name, type=int, required=True)
    return parser


def answer(
    about: str, run: Callable[[int], float], tokens: int, rounds: Iterable = sys.stdin
) -> None:
    """Say what this is, then seconds of one token and of one more than ``tokens``, per round."""
    print(json.dumps({"about": about}), flush=True)
    for _ in rounds:
        print(json.dumps({"one": run(1), "all": run(tokens + 1)}), flush=True)
