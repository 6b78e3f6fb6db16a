"""`tpjax generate` and examples/generate.py: the same code."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from tpjax import env
from tpjax.errors import UsageError

DEFAULT_PROMPT = "ROMEO:\n"
DEFAULT_CPU_DEVICES = 4


def generate(args: argparse.Namespace) -> int:
    """Load, complete every prompt, print. Text to stdout, everything else to stderr."""
    prompts = read_prompts(args)
    start_devices(args)
    from tpjax.checkpoint.folder import bundled, locate, read_folder
    from tpjax.engine.llm import LLM
    from tpjax.report import Report

    report = Report(args.quiet)
    folder = locate(args.model or bundled())
    llm = LLM(
        folder,
        tensor_parallel_size=choose_degree(args, read_folder(folder).config, report.say),
        data_parallel_size=args.data_parallel_size,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=1 if args.stream else min(len(prompts), 64),
        progress=report.loading,
        on_build=report.building,
        say=report.say,
    )
    words = {w: getattr(args, w) for w in ("temperature", "top_k", "top_p", "min_p")}
    params = replace(
        llm.get_default_sampling_params(),
        max_tokens=args.max_tokens,
        seed=args.seed,
        stop=tuple(args.stop),
        **{word: value for word, value in words.items() if value is not None},
    )
    report.loaded(llm)
    llm.prepare(prompts[:1] if args.stream else prompts)
    if args.stream and not args.json:
        for prompt in prompts:
            _stream(llm, prompt, params, report)
        return 0
    outputs = _complete(llm, prompts, params, args.quiet)
    for output in outputs:
        _show(output, args.json, report)
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    seconds = max(o.timings.total for o in outputs)
    first = min(o.timings.time_to_first_token for o in outputs)
    report.say(
        f"compiled in {report.compile_s:.1f} s; first token after {first * 1e3:.0f} ms,"
        f" {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s"
    )
    return 0


def _complete(llm, prompts, params, quiet: bool):
    total = len(prompts) * params.max_tokens
    with tqdm(total=total, unit=" tokens", desc="generating", disable=quiet, leave=False) as bar:
        counted: dict[str, int] = {}

        def count(request) -> None:
            bar.update(len(request.token_ids) - counted.get(request.id, 0))
            counted[request.id] = len(request.token_ids)

        return llm.generate(prompts, params, on_progress=count)


def _stream(llm, prompt: str, params, report) -> None:
    pieces = llm.stream(prompt, params)
    report.say(prompt.rstrip("\n"))
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _show(output, as_json: bool, report) -> None:
    completion = output.outputs[0]
    if as_json:
        line = {
            "prompt": output.prompt,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)
        return
    report.say(f"\n{output.prompt.rstrip()}")
    print(completion.text, flush=True)


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
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise UsageError(f"--prompts-file {args.prompts_file}: no prompt in it")
        prompts += lines
    return prompts or [DEFAULT_PROMPT]


def start_devices(args: argparse.Namespace) -> None:
    """Start jax on the devices asked for: accelerators if there are any, else forced CPU devices,
    as many as the mesh needs or four."""
    tensor, data = args.tensor_parallel_size, args.data_parallel_size
    for name, size in (
        ("--tensor-parallel-size", tensor),
        ("--data-parallel-size", data),
        ("--devices", args.devices),
    ):
        if size is not None and size < 1:
            raise UsageError(f"{name} {size}: must be 1 or more")
    devices = args.devices
    if devices is None and not env.has_accelerator():
        devices = (tensor or DEFAULT_CPU_DEVICES) * (data or 1)
    env.start(devices)


def choose_degree(args: argparse.Namespace, config, say: Callable[[str], None]) -> int:
    """The tensor degree asked for, or the largest this model allows on all devices."""
    if args.tensor_parallel_size is not None:
        return args.tensor_parallel_size
    import jax

    from tpjax.parallel.mesh import allowed_degrees

    available = args.devices or (len(jax.devices()) if env.has_accelerator() else None)
    if available is None:
        available = DEFAULT_CPU_DEVICES * (args.data_parallel_size or 1)
    each = max(1, available // (args.data_parallel_size or 1))
    degree = max(d for d in allowed_degrees(config) if d <= each)
    if degree < each:
        say(f"using {degree} of {each} devices: heads={config.heads} cannot be split further")
    return degree
