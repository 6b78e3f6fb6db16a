"""A family is data: how its Hugging Face config becomes facts, and what its weights are called."""

from collections.abc import Callable
from dataclasses import dataclass

from tpjax.config import ModelConfig
from tpjax.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    ``names`` maps our weight paths, with ``{layer}``, to checkpoint names; ``ignored`` lists
    endings of checkpoint names that hold no weight.
    """

    model_type: str
    config: Callable[[dict], ModelConfig]
    names: dict[str, str]
    ignored: tuple[str, ...] = ()

    def source(self, path: str) -> str:
        """The checkpoint's name of one of our weights."""
        head, _, rest = path.partition(".")
        if head != "blocks":
            return self.names[path]
        layer, _, inside = rest.partition(".")
        return self.names[f"blocks.{{layer}}.{inside}"].format(layer=layer)


FAMILIES: dict[str, Family] = {}


def family(model_type: str, *, names: dict[str, str], ignored: tuple[str, ...] = ()):
    """Register the decorated function, which turns a normalised config dict into a ModelConfig."""

    def register(config: Callable[[dict], ModelConfig]):
        FAMILIES[model_type] = Family(model_type, config, names, ignored)
        return config

    return register


def find(model_type: str | None, where: str) -> Family:
    """The family of a ``model_type``; raises CheckpointError listing the known ones."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"{where}: unknown model_type {model_type!r}; known: {known}")
    return FAMILIES[model_type]
