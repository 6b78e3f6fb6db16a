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
    about: str,
    run: Callable[[int], tuple[float, float]],
    tokens: int,
    rounds: Iterable = sys.stdin,
) -> None:
    """Say what this is; then, per round, seconds until every sequence has its first token, and of
    ``tokens`` more of each."""
    print(json.dumps({"about": about}), flush=True)
    for _ in rounds:
        first, rest = run(tokens + 1)
        print(json.dumps({"first": first, "rest": rest}), flush=True)
