"""Plans by pattern: which weights are split, said by globs over their paths. No jax.

A pattern names linears (``blocks.*.attn.q``), tables (``embed``, ``head``) or experts
(``blocks.*.moe.up``), and its value the axes of their inputs and outputs, in the order of
``y = x @ w``: ``("embed", "tensor")`` is column-parallel, ``("tensor", "embed")`` row-parallel,
``(None, None)`` whole on each device. Of experts the first axis is theirs. A mesh's axis says that
a dimension is split as the rules split it, over all axes they name. The first pattern that matches
decides.

Plans of transformers (``base_model_tp_plan``, ``tp_plan``) are the same in other words.
"""

import fnmatch
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tpjax.config import ModelConfig
from tpjax.errors import UsageError
from tpjax.inventory import Weight, weights
from tpjax.models import Family, find
from tpjax.parallel.degrees import AXES
from tpjax.parallel.layout import Layout, Unsplit, module_of
from tpjax.parallel.rules import Rules

Axes = tuple[str | None, ...]
Patterns = tuple[tuple[str, Axes | str], ...]
LARGE = 1 << 20  # bytes: what nobody splits by accident

_SPLIT, _WHOLE = "tensor", None
# What transformers' words mean for a weight, inputs and outputs.
_STYLES: dict[str, Axes] = {
    "colwise": (_WHOLE, _SPLIT),
    "colwise_rep": (_WHOLE, _SPLIT),
    "colwise_gather_output": (_WHOLE, _SPLIT),
    "packed_colwise": (_WHOLE, _SPLIT),
    "local_colwise": (_WHOLE, _SPLIT),
    "local_packed_colwise": (_WHOLE, _SPLIT),
    "rowwise": (_SPLIT, _WHOLE),
    "rowwise_rep": (_SPLIT, _WHOLE),
    "rowwise_split_input": (_SPLIT, _WHOLE),
    "packed_rowwise": (_SPLIT, _WHOLE),
    "local_rowwise": (_SPLIT, _WHOLE),
    "local_packed_rowwise": (_SPLIT, _WHOLE),
    "embedding_rowwise": (_SPLIT, _WHOLE),
    "vocab_parallel_rowwise": (_SPLIT, _WHOLE),
    "replicate": (_WHOLE, _WHOLE),
    "replicated": (_WHOLE, _WHOLE),
    "replicated_with_grad_allreduce": (_WHOLE, _WHOLE),
    "sequence_parallel": (_WHOLE, _WHOLE),
    "grouped_gemm": ("expert", _WHOLE, _WHOLE),
}
# What they say of modules that hold no weight of their own: how their inputs are handed around.
_OF_MODULES = {"moe_tp_experts", "ep_dispatch_experts", "ep_router", "gather", "local", "isolated"}


@dataclass(frozen=True)
class Decided:
    """What patterns come to. ``by``: of every weight that a pattern decided, the pattern."""

    unsplit: Unsplit
    by: dict[str, str]

    def applied(self, layout: Layout) -> Layout:
        """The layout as the patterns have it."""
        return replace(layout, unsplit=self.unsplit)


def asked(plan: str | None, allow: Sequence[str]) -> tuple[Patterns, tuple[str, ...]]:
    """What ``--plan FILE`` and ``--allow`` say. Raises UsageError."""
    if allow and not plan:
        raise UsageError(f"--allow {allow[0]}: is for --plan FILE")
    return read(Path(plan)) if plan else (), tuple(allow)


def read(file: Path) -> Patterns:
    """The patterns of a TOML or JSON file, in its order: a table ``patterns``, or all of it. Raises
    UsageError."""
    try:
        text = file.read_text()
        raw = (
            json.loads(text, object_pairs_hook=lambda pairs: _once(file, pairs))
            if file.suffix == ".json"
            else tomllib.loads(text)
        )
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"{file}: not a plan ({error})") from error
    raw = raw.get("patterns", raw) if isinstance(raw, dict) else raw
    if not isinstance(raw, dict) or not raw:
        raise UsageError(f"{file}: not a plan: a table of patterns, each with its axes")
    return normal(raw)


def normal(raw: Mapping) -> Patterns:
    """Patterns as a tuple of pairs. Raises UsageError for values that are no axes and no style."""
    out = []
    for pattern, value in raw.items():
        if isinstance(value, str):
            out.append((str(pattern), value))
        elif isinstance(value, Sequence) and all(v is None or isinstance(v, str) for v in value):
            out.append((str(pattern), tuple(None if v in ("", "-") else v for v in value)))
        else:
            raise UsageError(f"pattern {pattern!r}: {value!r} are no axes, as in [embed, tensor]")
    return tuple(out)


def decide(
    config: ModelConfig, layout: Layout, patterns: Patterns, allow: Sequence[str] = ()
) -> Decided:
    """Which modules stay whole in which axes. ``allow``: patterns of weights that may be whole
    though they are large. Raises UsageError for a pattern that matches nothing or never decides,
    for an unknown axis, for axes that no product can have, for a large weight nobody splits, and
    for products whose inputs are not split as the outputs before them are."""
    theirs = any(isinstance(value, str) for _, value in patterns)
    family = find(config.family, "plan") if theirs else None
    every = [w for w in weights(config, layout) if len(w.dims) > 1]
    axes = {pattern: _axes(pattern, value) for pattern, value in patterns}
    by: dict[str, str] = {}
    matched: dict[str, list[str]] = {pattern: [] for pattern in axes}
    for weight in every:
        names = _names_of(weight, family, config.tie_embeddings)
        for pattern in axes:
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                matched[pattern].append(weight.path)
                by.setdefault(weight.path, pattern)
    _check_used(axes, matched, by, family, config.tie_embeddings)

    whole: dict[str, dict[str, set[bool]]] = {}
    for weight in every:
        pattern = by.get(weight.path)
        asked = axes[pattern] if pattern else None
        asked_here = _in_order(weight, asked, pattern)
        for dim, wanted in zip(weight.dims, asked_here, strict=True):
            # A mesh's axis must be one that its rule splits it over; a model's its own.
            if wanted not in (None, dim.axis, *Rules().mesh_axes(dim.axis)):
                raise UsageError(
                    f"pattern {pattern!r}: {weight.path} cannot be split over {wanted!r} there: its"
                    f" axes are {_names(weight)}"
                )
            if dim.axis in (None, "embed"):
                continue
            module = whole.setdefault(module_of(weight.path), {})
            module.setdefault(str(dim.axis), set()).add(wanted is None)
        if _too_large(weight, layout, asked_here, allow):
            fix = "none of its axes is" if pattern else "no pattern does"
            raise UsageError(
                f"{weight.path}: {weight.bytes / 1e6:.0f} MB whole on each device, {fix} split;"
                f" add a pattern, or allow it: --allow {weight.path}"
            )
    for module, found in whole.items():
        for axis, said in found.items():
            if len(said) > 1:
                raise UsageError(_partners(module, axis, every, by, axes))
    unsplit = {
        module: frozenset(a for a, said in found.items() if said == {True} and layout.shards(a) > 1)
        for module, found in whole.items()
    }
    for module, axes_ in unsplit.items():
        if "heads" in axes_ and "kv_heads" in whole[module] and "kv_heads" not in axes_:
            if layout.shards("kv_heads") > 1:
                raise UsageError(
                    f"{module}.k: split along kv_heads, but {module}.q not along heads: queries"
                    " must be where their keys are"
                )
    return Decided(tuple((m, axes_) for m, axes_ in unsplit.items() if axes_), by)


def _axes(pattern: str, value: Axes | str) -> Axes | None:
    """The axes that a value means; None where it is about no weight."""
    if isinstance(value, str):
        if value in _OF_MODULES:
            return None
        if value not in _STYLES:
            known = ", ".join(sorted(_STYLES | dict.fromkeys(_OF_MODULES, ())))
            raise UsageError(f"pattern {pattern!r}: unknown style {value!r}; known are {known}")
        return _STYLES[value]
    logical = {f.name for f in fields(Rules)}
    for axis in value:
        if axis is not None and axis not in (logical | set(AXES)) - {"data", "batch"}:
            raise UsageError(
                f"pattern {pattern!r}: unknown axis {axis!r}; known are {', '.join(AXES[1:])} of"
                f" the mesh and {', '.join(sorted(logical - {'batch'}))} of the model"
            )
    usual = Rules()
    return tuple(
        axis if axis is not None and (axis in AXES or usual.mesh_axes(axis)) else None
        for axis in value
    )


def _names_of(weight: Weight, family: Family | None, tied: bool) -> list[str]:
    """What a pattern may call a weight: its path, its module, or as transformers does. A table that
    makes the logits too is the head as well."""
    names = [weight.path, weight.path.removesuffix(".w")]
    if tied and weight.path == "embed.w":
        names.append("head")
    if family is not None:
        theirs = _their_names(weight, family)
        if "head" in names:
            theirs.append(family.names["head"].removesuffix(".weight"))
        names += theirs + [name.removeprefix("model.") for name in theirs]
    return names


def _their_names(weight: Weight, family: Family) -> list[str]:
    """What transformers calls the module of a weight."""
    name = family.name(weight.path).removesuffix(".weight")
    if ".moe." not in weight.path or ".shared" in weight.path:
        return [name]
    layer = weight.path.split(".")[1]
    leaf = weight.path.rpartition(".")[2]
    experts = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
    if leaf not in experts:
        return [f"model.layers.{layer}.mlp.gate"]
    return [f"model.layers.{layer}.mlp.experts.{experts[leaf]}"]


def _check_used(
    axes: Mapping[str, Axes | None],
    matched: Mapping[str, list[str]],
    by: Mapping[str, str],
    family: Family | None,
    tied: bool,
) -> None:
    for pattern, found in matched.items():
        if axes[pattern] is None:  # of a module that holds no weight of its own
            continue
        if not found and family is not None and _of_family(pattern, family):
            continue  # this model has none, others of its family do
        if not found:
            raise UsageError(f"pattern {pattern!r}: matches no weight of this model")
        if tied and found == ["embed.w"]:  # a table that is the head too may be called both
            continue
        if all(by[path] != pattern for path in found):
            first = by[found[0]]
            raise UsageError(
                f"pattern {pattern!r}: never decides, {first!r} before it matches the same weights;"
                " drop one, or put the narrower one first"
            )


def _of_family(pattern: str, family: Family) -> bool:
    """Whether the family has weights of such a name, in whatever layer."""
    names = [
        name.replace("{layer}", "0").replace("{expert}", "0").removesuffix(".weight")
        for name in family.names.values()
    ]
    names += [name.removeprefix("model.") for name in names]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _in_order(weight: Weight, asked: Axes | None, pattern: str | None) -> Axes:
    """What is asked of each dimension as stored: experts, outputs, inputs."""
    if asked is None:
        return (None,) * len(weight.dims)
    experts = weight.dims[0].axis == "experts"
    if experts and len(asked) == 2:
        asked = (None, *asked)
    if len(asked) != len(weight.dims):
        raise UsageError(
            f"pattern {pattern!r}: {len(asked)} axes, but {weight.path} has {len(weight.dims)}:"
            f" {_names(weight)}"
        )
    if weight.path == "embed.w" and "head" not in (pattern or ""):
        return asked  # its inputs are tokens: stored as looked up
    *first, inputs, outputs = asked
    return (*first, outputs, inputs)


def _names(weight: Weight) -> str:
    """Its axes in the order of patterns."""
    names = [dim.axis or "-" for dim in weight.dims]
    if weight.path != "embed.w":
        names[-2:] = names[-1], names[-2]
    return ", ".join(names)


def _too_large(weight: Weight, layout: Layout, asked: Axes, allow: Sequence[str]) -> bool:
    """Whether a weight that the usual rules split is left whole, and too large for that."""
    cut = [layout.shards(dim.axis) > 1 for dim in weight.dims]
    split = any(c and wanted is not None for c, wanted in zip(cut, asked, strict=True))
    if split or not any(cut) or weight.bytes < LARGE:
        return False
    names = (weight.path, weight.path.removesuffix(".w"))
    return not any(fnmatch.fnmatchcase(name, glob) for glob in allow for name in names)


def _partners(
    module: str,
    axis: str,
    every: Sequence[Weight],
    by: Mapping[str, str],
    axes: Mapping[str, Axes | None],
) -> str:
    split, whole = [], []
    for weight in every:
        if module_of(weight.path) != module:
            continue
        pattern = by.get(weight.path)
        asked = _in_order(weight, axes[pattern] if pattern else None, pattern)
        for dim, wanted in zip(weight.dims, asked, strict=True):
            if dim.axis == axis:
                (whole if wanted is None else split).append(weight.path.removesuffix(".w"))
    return (
        f"{', '.join(split)}: split along {axis}, but {', '.join(whole)} not: what one makes the"
        " other must take in the same parts"
    )


def _once(file: Path, pairs: list[tuple]) -> dict:
    names = [name for name, _ in pairs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"pattern {sorted(twice)[0]!r} is there twice")
    return dict(pairs)
