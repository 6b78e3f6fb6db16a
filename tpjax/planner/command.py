"""`tpjax plan`: what would run where, whether it fits and how fast it can be, before a device is
rented. Nothing here initialises an accelerator or imports jax."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from tpjax import patterns
from tpjax.config import DTYPES
from tpjax.errors import UsageError
from tpjax.planner import chips, models, report, search

DEFAULT_CONTEXT = 8192


def plan(args: argparse.Namespace) -> int:
    """Plan, rank, print. Exit code 0 also where nothing fits: that is an answer."""
    model, wish, notes = _wish(args)
    found, refused = search.meshes(wish)
    ranked = search.rank(found, args.goal)
    sentence = search.explained(ranked, args.goal, wish)
    plain = replace(ranked[0].layout, unsplit=())
    decided = patterns.decide(wish.config, plain, wish.patterns, wish.allow).by if args.plan else {}
    notes += [] if ranked[0].fits else ["nothing fits"]
    if args.plot:
        from tpjax.planner.plot import plot as draw

        draw(Path(args.plot), model.name, wish, ranked[0])
    if args.json:
        told = report.document(wish, model.name, ranked, refused, sentence, notes)
        if args.explain:
            told["weights"] = report.weights_of(wish, ranked[0].layout, decided)
        print(json.dumps(told))
        return 0
    out = report.lines(wish, model.name, ranked, refused, sentence, notes, args.markdown)
    if args.explain:
        out += ["", f"weights on {ranked[0].words}", ""]
        out += report.explanation(wish, ranked[0].layout, decided, args.markdown)
    print("\n".join(out))
    return 0


def _wish(args: argparse.Namespace) -> tuple[models.Model, search.Wish, list[str]]:
    """What the arguments mean. Raises UsageError for numbers that make no sense."""
    model, notes = models.find(args.model, args.dtype if args.dtype in DTYPES else None), []
    config = model.config
    hardware = chips.parse(args.hardware, Path(args.hardware_file) if args.hardware_file else None)
    context = args.context or min(config.max_position, DEFAULT_CONTEXT)
    for word in ("context", "batch", "prompt", "tensor", "data", "expert", "stage"):
        value = getattr(args, word)
        if value is not None and value < 1:
            raise UsageError(f"--{word} {value}: must be 1 or more")
    if context > config.max_position:
        notes.append(
            f"context {context} is beyond the {config.max_position} positions of the model"
        )
    axes = {a: getattr(args, a) for a in ("data", "stage", "expert", "tensor") if getattr(args, a)}
    wish = search.Wish(
        config=config,
        hardware=hardware,
        context=context,
        batch=args.batch,
        prompt=min(args.prompt, context),
        weight_dtype=args.dtype or config.dtype,
        cache_dtype=args.kv_dtype or config.dtype,
        axes=axes,
        patterns=patterns.read(Path(args.plan)) if args.plan else (),
        allow=tuple(args.allow),
    )
    return model, wish, notes
