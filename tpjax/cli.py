"""The `tpjax` command. Parsing only: jax is imported once the arguments are known to be good."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from tpjax import __version__


def command(argv: Sequence[str] | None = None) -> int:
    """The program `tpjax`: `main` in a process of its own."""
    return run_command(build_parser(), argv, own_process=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (2 usage, 3 model, 4 resources, 5 while running)."""
    return run_command(build_parser(), argv)


def run_command(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, own_process: bool = False
) -> int:
    """Parse, run what the command names as ``run`` (module:function), and turn what goes wrong
    into one line and an exit code. In a process of our own torch is left out, unless an option
    whose name is in the command's ``torch_for`` asks for what needs it."""
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if own_process:
        from tpjax import env

        env.collect_rarely()
        if not getattr(args, getattr(args, "torch_for", ""), None):
            env.leave_torch_out()
    from tpjax.errors import ResourceError, RunError, TpjaxError

    try:
        module, _, function = args.run.partition(":")
        return getattr(importlib.import_module(module), function)(args)
    except TpjaxError as error:
        return _fail(parser, args, error, error.exit_code)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; what is still buffered for them must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        out_of_memory = "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError)
        code = ResourceError.exit_code if out_of_memory else RunError.exit_code
        return _fail(parser, args, error, code)


def _fail(parser, args: argparse.Namespace, error: Exception, code: int) -> int:
    if args.debug:
        raise error
    first = (str(error).strip().splitlines() or [""])[0]
    kind = "" if hasattr(error, "exit_code") else f"{type(error).__name__}: "
    hint = "" if hasattr(error, "exit_code") else " (--debug shows where)"
    print(f"{parser.prog}: error: {kind}{first}{hint}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="tpjax", description="Large language models over a named device mesh."
    )
    parser.add_argument("--version", action="version", version=f"tpjax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_generate(commands)
    _add_plan(commands)
    _add_audit(commands)
    _add_bench(commands)
    return parser


def _add_generate(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="complete prompts",
        description="Complete prompts. Without arguments: the bundled model, on all accelerators"
        " or, if there are none, on four forced CPU devices.",
        epilog="examples: tpjax generate --model meta-llama/Llama-3.2-1B -tp 2 --prompt 'Once';"
        " tpjax generate --model meta-llama/Llama-3.2-1B-Instruct --chat --prompt 'Who was Ahab?'",
    )
    add = parser.add_argument
    add("--version", action="version", version=f"tpjax {__version__}")
    add("--model", metavar="DIR|ID", help="a folder or a hub id; default: the bundled model")
    add("--prompt", action="append", metavar="TEXT", help="repeatable")
    add("--prompts-file", metavar="FILE", help="one prompt per line; - is standard input")
    add(
        "--chat",
        action="store_true",
        help="each prompt is a user's message, put through the tokenizer's own chat template",
    )
    add("--system", metavar="TEXT", help="with --chat: a system message before each prompt")
    _add_mesh(parser)
    _add_patterns(parser)
    add("--verify", choices=("fast", "full"), help="how to check a tpjax checkpoint; default: fast")
    add("--max-model-len", type=int, metavar="N", help="prompt plus generated tokens")
    add("--max-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    model_default = "default: the model's generation config"
    add("--temperature", type=float, metavar="T", help=f"0 is greedy; {model_default}")
    add("--top-k", type=int, metavar="K", help=model_default)
    add("--top-p", type=float, metavar="P", help=model_default)
    add("--min-p", type=float, metavar="P", help=model_default)
    add("--seed", type=int, default=0, metavar="N", help="of every prompt; default: %(default)s")
    add("--stop", action="append", default=[], metavar="TEXT", help="end there; repeatable")
    add("--stream", action="store_true", help="print text as it is made, prompt by prompt")
    add("--json", action="store_true", help="one JSON object per prompt")
    add_common(parser, "tpjax.generate:generate")


def add_common(parser: argparse.ArgumentParser, run: str) -> None:
    """Options that every command of ours has, and what it runs (module:function)."""
    add = parser.add_argument
    add("--quiet", action="store_true", help="results only")
    add("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run)  # module:function, imported once the arguments are good


def _add_mesh(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tensor-parallel-size", "-tp", type=int, metavar="N", help="devices per replica")
    add("--data-parallel-size", type=int, metavar="N", help="replicas; default: 1")
    add(
        "--expert-parallel-size", type=int, metavar="N", help="devices for whole experts, times -tp"
    )
    add("--devices", type=int, metavar="N", help="force N CPU devices")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16; default: %(default)s")


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="what would run where, whether it fits, how fast it can be",
        description="Every sensible mesh for a model on hardware that need not be there: bytes on"
        " each device, largest batch and context, communication, predicted speed.",
        epilog="examples: tpjax plan llama-3.1-70b --hardware h100:8 --batch 32;"
        " tpjax plan Qwen/Qwen3-30B-A3B --hardware l40s:4 --goal throughput --json",
    )
    add = parser.add_argument
    add(
        "model", metavar="MODEL", help="a published model's name, a folder, a config.json, a hub id"
    )
    add(
        "--hardware",
        default="h100:8",
        metavar="CHIP:N",
        help="h100:8, h100:8x4; default: %(default)s",
    )
    add("--hardware-file", metavar="FILE", help="chips of your own, a TOML file")
    add(
        "--context",
        type=int,
        metavar="N",
        help="positions of each sequence; default: the model's, at most 8192",
    )
    add("--batch", type=int, default=1, metavar="N", help="sequences at once; default: %(default)s")
    add(
        "--prompt",
        type=int,
        default=512,
        metavar="N",
        help="of the first token's time; default: %(default)s",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32", "int8", "float8"),
        help="of the weights; default: the checkpoint's",
    )
    add(
        "--kv-dtype",
        choices=("bfloat16", "float16", "float32", "int8", "float8"),
        help="of the cache",
    )
    for axis in ("data", "stage", "expert", "tensor"):
        add(f"--{axis}", type=int, metavar="N", help="only meshes with this size of the axis")
    add(
        "--goal",
        choices=("latency", "throughput", "memory"),
        default="latency",
        help="what to rank by; default: %(default)s",
    )
    _add_patterns(parser)
    add("--explain", action="store_true", help="a line for every weight, of the best mesh")
    add("--markdown", action="store_true", help="tables as markdown")
    add("--plot", metavar="FILE", help="curves and the mesh as a picture, .png, .svg or .pdf")
    add("--json", action="store_true", help="one JSON object")
    add_common(parser, "tpjax.planner.command:plan")


def _add_patterns(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--plan", metavar="FILE", help="patterns of weights and their axes, TOML or JSON")
    allowed = "a weight, or a pattern, that --plan may leave whole though it is large; repeatable"
    add("--allow", action="append", default=[], metavar="WEIGHT", help=allowed)


def _add_audit(commands) -> None:
    parser = commands.add_parser(
        "audit",
        help="compile the real step for a target and hold it against its plan",
        description="Compile a model's prefill and decode for hardware that need not be there, and"
        " compare collectives, bytes and copies with what the plan states. Exit code 1 and the"
        " culprit's name where they differ.",
        epilog="examples: tpjax audit llama-3.1-70b --hardware h100:8;"
        " tpjax audit mixtral-8x7b-v0.1 --hardware cpu:8 --expert 8 --layers 2 --json",
    )
    add = parser.add_argument
    add(
        "model", metavar="MODEL", help="a published model's name, a folder, a config.json, a hub id"
    )
    add("--hardware", default="h100:8", metavar="CHIP:N", help="h100:8, h100:8x2, cpu:8, v5e:8")
    for axis in ("data", "expert", "tensor"):
        add(f"--{axis}", type=int, metavar="N", help="of the mesh; tensor takes what is left")
    add("--step", choices=("decode", "prefill"), help="default: both")
    add("--batch", type=int, default=1, metavar="N", help="sequences; default: %(default)s")
    add("--context", type=int, metavar="N", help="default: the model's, at most 8192")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the checkpoint's")
    _add_patterns(parser)
    add("--layers", type=int, metavar="N", help="only so many layers, of every kind")
    add("--json", action="store_true", help="one JSON object")
    add_common(parser, "tpjax.audit.command:audit")


def _add_bench(commands) -> None:
    bench = commands.add_parser("bench", help="measure", description="Measure.")
    kinds = bench.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_bench_steps(kinds, "decode")
    _add_bench_steps(kinds, "prefill")
    _add_bench_start(kinds, "start")
    _add_bench_start(kinds, "load")


def _add_bench_steps(kinds, kind: str) -> None:
    decode = kind == "decode"
    parser = kinds.add_parser(
        kind,
        help="loading, compiling, prefill and decode" if decode else "prompts to first tokens",
        description="Measure loading, compiling, prefill and greedy decode; one JSON object."
        if decode
        else "Measure the time from prompts to their first tokens; one JSON object.",
        epilog=f"example: tpjax bench {kind} --config config.json -tp 2 --compare hf --json",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR|ID", help="default: the bundled model")
    source.add_argument("--config", metavar="FILE", help="a config.json, with random weights")
    _add_mesh(parser)
    add("--batch", type=int, default=1, metavar="N", help="sequences; default: %(default)s")
    length = 128 if decode else 512
    add("--prompt-length", type=int, default=length, metavar="N", help="default: %(default)s")
    add(
        "--compare",
        action="append",
        default=[],
        metavar="PEER,PEER",
        help="measure these beside it, round by round: hf (transformers), hf-tp (its processes"
        " under torchrun), torch-compile, llama.cpp",
    )
    if decode:
        add("--max-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
        add(
            "--sweep",
            metavar="AXIS,AXIS",
            help="measure decode steps at other values of tensor, batch or context instead, all"
            " combinations: batch,context or tensor=1/4",
        )
        add("--plot", metavar="FILE", help="draw the sweep: .png, .svg or .pdf")
    add("--rounds", type=int, default=5, metavar="N", help="at least 5; default: %(default)s")
    add("--record", metavar="FILE", nargs="?", const="BENCHMARKS.md", help="append the rows there")
    add("--json", action="store_true", help="one line of JSON (else indented)")
    add_common(parser, f"tpjax.bench.decode:bench_{kind}")


def _add_bench_start(kinds, kind: str) -> None:
    start = kind == "start"
    parser = kinds.add_parser(
        kind,
        help="a process to its first token" if start else "weights onto devices, and the memory",
        description="Measure starts of a process until its first token, the first one and later"
        " ones; one JSON object."
        if start
        else "Measure how long weights take onto devices, and the memory that needs; one JSON"
        " object.",
        epilog=f"example: tpjax bench {kind} --model DIR -tp 2 --dtype bfloat16 --json",
    )
    add = parser.add_argument
    add("--model", metavar="DIR|ID", help="default: the bundled model")
    if start:
        _add_mesh(parser)
        add(
            "--compare",
            action="append",
            default=[],
            metavar="PEER",
            help="start this beside it, round by round: hf (transformers)",
        )
    else:
        add("--tensor-parallel-size", "-tp", type=int, metavar="N", help="forced CPU devices")
        add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--rounds", type=int, default=5, metavar="N", help="at least 5; default: %(default)s")
    add("--json", action="store_true", help="one line of JSON (else indented)")
    add_common(parser, f"tpjax.bench.start:bench_{kind}")


if __name__ == "__main__":
    sys.exit(command())
