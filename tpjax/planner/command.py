"""`tpjax plan`: what would run where, whether it fits and how fast it can be, before a device is
rented. Nothing here initialises an accelerator or imports jax."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from tpjax import patterns
from tpjax.config import DTYPES
from tpjax.errors import UsageError
from tpjax.planner import chips, explain, models, search
from tpjax.planner.report import Answer

DEFAULT_CONTEXT = 8192


def plan(args: argparse.Namespace) -> int:
    """Plan, rank, print. Exit code 0 also where nothing fits: that is an answer."""
    model, wish, notes = _wish(args)
    found, refused = search.meshes(wish)
    ranked = search.rank(found, args.goal)
    plain = replace(ranked[0].layout, unsplit=())
    decided = patterns.decide(wish.config, plain, wish.patterns, wish.allow).by if args.plan else {}
    answer = Answer(
        name=model.name,
        wish=wish,
        ranked=ranked,
        refused=refused,
        sentence=search.explained(ranked, args.goal, wish),
        notes=notes if ranked[0].fits else [*notes, "nothing fits"],
    )
    if args.plot:
        from tpjax.planner.plot import plot as draw

        draw(Path(args.plot), model.name, wish, ranked[0])
    if args.json:
        told = answer.document()
        if args.explain:
            told["weights"] = explain.documents(wish, ranked[0].layout, decided)
        print(json.dumps(told))
        return 0
    out = answer.lines(args.markdown)
    if args.explain:
        out += ["", f"weights on {ranked[0].words}", ""]
        out += explain.lines(wish, ranked[0].layout, decided, args.markdown)
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
    plan, allow = patterns.asked(args.plan, args.allow)
    wish = search.Wish(
        config=config,
        hardware=hardware,
        context=context,
        batch=args.batch,
        prompt=min(args.prompt, context),
        weight_dtype=args.dtype or config.dtype,
        cache_dtype=args.kv_dtype or config.dtype,
        axes=axes,
        patterns=plan,
        allow=allow,
    )
    return model, wish, notes
