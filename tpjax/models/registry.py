"""A family is data: how its Hugging Face config becomes facts, and what its weights are called."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from tpjax.config import ModelConfig
from tpjax.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    ``names`` maps our weight paths, with ``{layer}``, to checkpoint names. Several paths with one
    name are the rows of one tensor, in that order; a name with ``{expert}`` is one tensor for each
    of the weight's experts. ``roots``: what published checkpoints write where ``names`` has the
    first of them. ``ignored``: patterns of names that are no weight of the language model.
    """

    model_type: str
    config: Callable[[dict], ModelConfig]
    names: dict[str, str]
    roots: tuple[str, ...] = ("model.",)
    ignored: tuple[str, ...] = ()

    def name(self, path: str) -> str:
        """The checkpoint's name of one of our weights; with ``{expert}`` if it has experts."""
        template, layer = _template(path)
        name = self.names[template]
        return name if layer is None else name.replace("{layer}", layer)

    def rank(self, path: str) -> int:
        """Where a path is among those with the same name."""
        return list(self.names).index(_template(path)[0])

    def as_in(self, stored: Collection[str]) -> "Family":
        """This family with the root, and the head's prefix, that these tensors' names have."""
        embedding, head = self.names["embed.w"].removeprefix(self.roots[0]), self.names["head"]
        found = [root for root in self.roots if root + embedding in stored] or [self.roots[0]]
        heads = [name for name in stored if name == head or name.endswith(f".{head}")]
        old, new = self.roots[0], found[0]
        names = {
            path: new + name.removeprefix(old) if name.startswith(old) else name
            for path, name in self.names.items()
        }
        return replace(self, names=names | {"head": heads[0] if len(heads) == 1 else head})

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint's tensor is none of the language model's weights."""
        return any(re.search(pattern, name) for pattern in self.ignored)


def _template(path: str) -> tuple[str, str | None]:
    head, _, rest = path.partition(".")
    if head != "blocks":
        return path, None
    layer, _, inside = rest.partition(".")
    return f"blocks.{{layer}}.{inside}", layer


FAMILIES: dict[str, Family] = {}


def family(
    model_type: str,
    *,
    names: dict[str, str],
    roots: tuple[str, ...] = ("model.",),
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",),
):
    """Register the decorated function, which turns a normalised config dict into a ModelConfig."""

    def register(config: Callable[[dict], ModelConfig]):
        FAMILIES[model_type] = Family(model_type, config, names, roots, ignored)
        return config

    return register


def find(model_type: str | None, where: str) -> Family:
    """The family of a ``model_type``; raises CheckpointError listing the known ones."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"{where}: unknown model_type {model_type!r}; known: {known}")
    return FAMILIES[model_type]
