"""What a caller hands over, checked: prompts as text or token ids, whole numbers."""

import numbers
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tpjax.errors import UsageError
from tpjax.params import SamplingParams

Prompt = str | Sequence[int]


def as_prompts(prompts) -> list[Prompt]:
    """One prompt, text or ids, is a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    prompts = _items(prompts)
    if prompts and all(isinstance(p, numbers.Real) for p in prompts):
        return [prompts]
    return [p if isinstance(p, str) else _items(p) for p in prompts]


def _items(x) -> list:
    """The items of a list; neither the keys of a dict nor the numbers in bytes are meant."""
    if isinstance(x, bytes | Mapping) or not isinstance(x, Iterable):
        raise UsageError(f"prompt {x!r}: give text, a list of token ids, or a list of those")
    return list(x)


def as_params(params, count: int) -> list[SamplingParams]:
    """One SamplingParams per prompt, from one for all or from a list."""
    if isinstance(params, SamplingParams):
        return [params] * count
    each = list(params) if isinstance(params, Sequence) else [params]
    for one in each:
        if not isinstance(one, SamplingParams):
            raise UsageError(f"sampling_params={one!r}: give SamplingParams, one or a list")
    if len(each) != count:
        raise UsageError(f"{count} prompts but {len(each)} sampling_params")
    return each


def check_ids(ids: Sequence[int], vocab: int, max_model_len: int, room: int) -> list[int]:
    """Token ids as ints, each inside the vocabulary, leaving ``room`` positions for new ones."""
    if not ids:
        raise UsageError("empty prompt: give at least one token")
    for id_ in ids:
        if not isinstance(id_, int | np.integer):
            raise UsageError(f"prompt token {id_!r}: token ids are whole numbers")
        if not 0 <= id_ < vocab:
            raise UsageError(f"token id {id_} is outside vocab={vocab}")
    if len(ids) + room > max_model_len:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, max_model_len={max_model_len} allows"
            f" {max_model_len - room}; raise max_model_len or shorten the prompt"
        )
    return [int(i) for i in ids]


def whole(name: str, value, low: int, beyond: int) -> None:
    """Raise UsageError unless ``value`` is a whole number, ``low`` or more and below ``beyond``."""
    if not isinstance(value, int | np.integer) or not low <= value < beyond:
        raise UsageError(f"{name}={value!r}: must be a whole number, {low} or more")
