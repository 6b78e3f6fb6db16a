"""The `tpjax-checkpoint` command. Parsing only: jax is imported once the arguments are known to be
good."""

import argparse
import sys
from collections.abc import Sequence

from tpjax import __version__
from tpjax.cli import add_common, run_command

PROGRAM = "tpjax-checkpoint"


def command(argv: Sequence[str] | None = None) -> int:
    """The program `tpjax-checkpoint`: `main` in a process of its own."""
    return run_command(build_parser(), argv, own_process=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code (1 a difference was found, 2 usage, 3 checkpoint,
    4 resources, 5 while running)."""
    return run_command(build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Hugging Face checkpoints into tpjax checkpoints (sharded Orbax) and back.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = parser.add_subparsers(dest="command", metavar="VERB")
    _add_convert(verbs)
    _add_inspect(verbs)
    _add_verify(verbs)
    _add_export(verbs)
    return parser


def _add_convert(verbs) -> None:
    parser = verbs.add_parser(
        "convert",
        help="Hugging Face to tpjax",
        description="Convert a Hugging Face checkpoint to a tpjax checkpoint, which restores on any"
        " mesh. Needs the memory of --max-host-gb, whatever the model's size; can be killed at any"
        " moment and resumed; DST appears whole or not at all.",
        epilog="example: tpjax-checkpoint convert meta-llama/Llama-3.1-70B /models/llama-70b"
        " --tensor 8 --resume",
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="a folder, a hub id or, with --dry-run, a config.json")
    add("dst", metavar="DST", nargs="?", help="a folder that does not exist yet")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as it is")
    _add_mesh(parser, "the mesh to tell bytes per device for; the checkpoint restores on any")
    add(
        "--max-host-gb",
        type=float,
        default=1.0,
        metavar="X",
        help="limit of all buffers; default: %(default)s",
    )
    add("--resume", action="store_true", help="go on with what was begun")
    add("--overwrite", action="store_true", help="replace the checkpoint at DST, or start again")
    add("--allow-nonfinite", action="store_true", help="accept NaNs and infinities")
    add("--dry-run", action="store_true", help="tell what would become what; write nothing")
    _add_common(parser, "checkpoints_tools.verbs:convert_verb")


def _add_inspect(verbs) -> None:
    parser = verbs.add_parser(
        "inspect",
        help="what a checkpoint is",
        description="Tell what a checkpoint of either format is, and what does not match, without"
        " reading weights. Exit code 1 if something does not.",
        epilog="example: tpjax-checkpoint inspect /models/llama-70b --weights",
    )
    parser.add_argument("path", metavar="PATH", help="a folder or a hub id")
    parser.add_argument("--weights", action="store_true", help="a line for every weight")
    _add_common(parser, "checkpoints_tools.verbs:inspect_verb")


def _add_verify(verbs) -> None:
    parser = verbs.add_parser(
        "verify",
        help="is every byte right",
        description="Read a tpjax checkpoint as the devices of a mesh would, put every weight"
        " together again and compare it with the manifest, byte for byte. Exit code 1 and the list"
        " if anything differs.",
        epilog="example: tpjax-checkpoint verify /models/llama-70b --against"
        " meta-llama/Llama-3.1-70B --tensor 4",
    )
    add = parser.add_argument
    add("dst", metavar="DST", help="a tpjax checkpoint")
    add("--against", metavar="SRC", help="also compare with the source itself")
    add("--tensor", type=int, metavar="N", help="default: another degree than it was planned for")
    what = "one prompt per line: also compare logits and layers with transformers, by torch"
    add("--logits", metavar="FILE", help=f"{what}; needs --against")
    parser.set_defaults(torch_for="logits")
    _add_common(parser, "checkpoints_tools.verbs:verify_verb")


def _add_export(verbs) -> None:
    parser = verbs.add_parser(
        "export",
        help="tpjax to Hugging Face",
        description="Write a tpjax checkpoint as a Hugging Face folder of safetensors, with the"
        " tensors, names and files it was converted from.",
        epilog="example: tpjax-checkpoint export /models/llama-70b /models/llama-70b-hf",
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="a tpjax checkpoint")
    add("dst", metavar="DST", help="a folder that does not exist yet")
    _add_common(parser, "checkpoints_tools.verbs:export_verb")


def _add_mesh(parser: argparse.ArgumentParser, what: str) -> None:
    for name in ("tensor", "rep", "data"):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help=what)
        what = "likewise"


def _add_common(parser: argparse.ArgumentParser, run: str) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_common(parser, run)


if __name__ == "__main__":
    sys.exit(command())
