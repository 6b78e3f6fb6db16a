"""`tpjax generate` and examples/generate.py: the same code."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from tpjax import env
from tpjax.checkpoint import room
from tpjax.checkpoint.files import held_bytes
from tpjax.config import check_dtype
from tpjax.devices import start_devices
from tpjax.engine.inputs import whole
from tpjax.errors import CheckpointError, UsageError
from tpjax.params import SamplingParams
from tpjax.patterns import asked as asked_patterns

DEFAULT_PROMPT = "ROMEO:\n"


def generate(args: argparse.Namespace) -> int:
    """Load, complete every prompt, print. Text to stdout, everything else to stderr."""
    prompts = read_prompts(args)
    words = ("temperature", "top_k", "top_p", "min_p")
    asked = {w: getattr(args, w) for w in words if getattr(args, w) is not None}
    asked |= dict(max_tokens=args.max_tokens, seed=args.seed, stop=tuple(args.stop))
    check(args, prompts, asked)
    patterns, allow = asked_patterns(args.plan, args.allow)
    with room.ahead(_held_bytes(args)):
        start_devices(args)
        from tpjax.checkpoint.folder import bundled
        from tpjax.engine.llm import LLM
        from tpjax.report import Report

        report = Report(args.quiet)
        llm = LLM(
            args.model or bundled(),
            tensor_parallel_size=args.tensor_parallel_size or "auto",
            data_parallel_size=args.data_parallel_size,
            expert_parallel_size=args.expert_parallel_size,
            patterns=dict(patterns) or None,
            allow=allow,
            dtype=args.dtype,
            verify=args.verify,
            expect=[] if args.chat else prompts[:1] if args.stream else prompts,
            expect_tokens=min(args.max_tokens, sys.maxsize),
            max_model_len=args.max_model_len,
            max_num_seqs=1 if args.stream else min(len(prompts), 64),
            progress=report.loading,
            on_build=report.building,
            say=report.say,
        )
    params = replace(llm.get_default_sampling_params(), **asked)
    report.loaded(llm)
    given = prompts
    if args.chat:
        given = llm.chat_prompts([_conversation(args.system, prompt) for prompt in prompts])
    if args.stream:
        for prompt, one in zip(prompts, given, strict=True):
            _stream(llm, prompt, one, params, report)
        return 0
    outputs = _complete(llm, given, params, args.quiet)
    for prompt, output in zip(prompts, outputs, strict=True):
        _show(prompt, output, args.json, report)
    report.speed(outputs)
    return 0


def _held_bytes(args: argparse.Namespace) -> int:
    """Bytes of weights that CPU devices will hold; 0 where that cannot be told by now."""
    on_cpu = args.devices is not None or not env.has_accelerator()
    if not (on_cpu and args.model and os.path.isdir(args.model)):
        return 0
    try:
        return held_bytes(Path(args.model), args.dtype)
    except (CheckpointError, OSError):
        return 0  # whoever loads them will say what is wrong


def _conversation(system: str | None, prompt: str) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def _complete(llm, prompts, params, quiet: bool):
    bar, counted = None, {}

    def count(request) -> None:
        nonlocal bar
        if bar is None:  # from the first token on: compiling has lines of its own
            total = len(prompts) * params.max_tokens
            from tqdm import tqdm

            bar = tqdm(total=total, unit=" tokens", desc="generating", disable=quiet, leave=False)
        bar.update(len(request.token_ids) - counted.get(request.id, 0))
        counted[request.id] = len(request.token_ids)

    outputs = llm.generate(prompts, params, on_progress=count)
    if bar is not None:
        bar.close()
    return outputs


def _stream(llm, prompt: str, given, params, report) -> None:
    last = []
    pieces = llm.stream(
        given, params, on_progress=lambda request: last.__setitem__(slice(1), [request])
    )
    report.say(f"\n{prompt.rstrip()}")
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)
    report.speed([request.output() for request in last])


def _show(prompt: str, output, as_json: bool, report) -> None:
    completion = output.outputs[0]
    if as_json:
        line = {
            "prompt": prompt,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)
        return
    report.say(f"\n{prompt.rstrip()}")
    print(completion.text, flush=True)


def check(args: argparse.Namespace, prompts: list[str], asked: dict) -> None:
    """Raise UsageError for what can be told to be wrong before jax is even imported."""
    SamplingParams(**asked)
    check_dtype(args.dtype)
    if args.max_model_len is not None:
        whole("max_model_len", args.max_model_len, 2, 2**31)
    if not all(prompts):
        raise UsageError("empty prompt: give at least one character")
    if args.stream and args.json:
        raise UsageError("--stream prints text and --json objects: give one of them")
    if args.system is not None and not args.chat:
        raise UsageError("--system is a message of a conversation: give --chat too")
    if args.chat and not args.prompt and not args.prompts_file:
        raise UsageError("--chat has no message to answer: give --prompt or --prompts-file")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts asked for, or the default one."""
    prompts = list(args.prompt or [])
    if args.prompts_file:
        try:
            text = (
                sys.stdin.read()
                if args.prompts_file == "-"
                else Path(args.prompts_file).read_text(encoding="utf-8")
            )
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts-file {args.prompts_file}: {error}") from error
        lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
        if not lines:
            raise UsageError(f"--prompts-file {args.prompts_file}: no prompt in it")
        prompts += lines
    return prompts or [DEFAULT_PROMPT]
