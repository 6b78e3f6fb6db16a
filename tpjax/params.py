"""What one request may ask of the sampler, checked where it is said. No jax."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tpjax.errors import UsageError

MAX_LOGPROBS = 20
# What a device is told of every sequence, an int32 each; then its stop ids.
WORDS = "token position remaining seed_high seed_low temperature top_k top_p min_p logprobs".split()
DEVICE_STOP_IDS = 8  # more than these are honoured too, on the host
COLUMNS = len(WORDS) + DEVICE_STOP_IDS

_RENAMED = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "top_logprobs": "logprobs",
    "random_seed": "seed",
    "temp": "temperature",
}


def refuse_unknown(what: str, unknown, known, renamed: dict[str, str]) -> None:
    """Raise UsageError for the first unknown word, naming the right one where there is one."""
    for name in unknown:
        right = renamed.get(name)
        hint = f"here it is called {right}" if right in known else right
        raise UsageError(
            f"{what}: unknown argument {name!r}; {hint or 'known: ' + ', '.join(known)}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks of the sampler. Names and defaults are vLLM's.

    ``temperature`` 0 is greedy. Filters apply in transformers' order: temperature, top_k (0 or -1
    is off), top_p, min_p. ``logprobs`` n returns the n likeliest tokens of every step beside the
    chosen one, from the raw logits. ``seed`` None takes one from the engine's seed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "stop", _several(self.stop))
        object.__setattr__(self, "stop_token_ids", _several(self.stop_token_ids))
        for name, kind, holds, wanted in _CHECKS:
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs"):
                continue
            if not (isinstance(value, kind) and holds(value)):
                raise UsageError(f"{name}={value!r}: must be {wanted}")


def _several(x) -> tuple:
    """None, one, or an iterable of several."""
    if x is None:
        return ()
    return tuple(x) if isinstance(x, Iterable) and not isinstance(x, str) else (x,)


_WHOLE = (int, np.integer)
_REAL = (*_WHOLE, float, np.floating)
_LARGEST = float(np.finfo(np.float32).max)
# Name, type, what must be true of a value of that type, and the same in words.
_CHECKS: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
    ("temperature", _REAL, lambda x: 0 <= x <= _LARGEST, "0 (greedy) or more, and finite"),
    ("top_p", _REAL, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    ("min_p", _REAL, lambda x: 0 <= x <= 1, "between 0 and 1"),
    ("top_k", _WHOLE, lambda x: x >= -1, "a whole number, 1 or more, or 0 for all tokens"),
    ("max_tokens", _WHOLE, lambda x: x >= 1, "a whole number, 1 or more"),
    ("seed", _WHOLE, lambda x: 0 <= x < 2**64, "None, or between 0 and 2**64 - 1"),
    (
        "logprobs",
        _WHOLE,
        lambda x: 0 <= x <= MAX_LOGPROBS,
        f"None, or a whole number between 0 and {MAX_LOGPROBS}",
    ),
    ("ignore_eos", bool, lambda x: True, "True or False"),
    ("stop", tuple, lambda x: all(isinstance(s, str) and s for s in x), "strings, not empty ones"),
    (
        "stop_token_ids",
        tuple,
        lambda x: all(isinstance(i, _WHOLE) and i >= 0 for i in x),
        "token ids, 0 or more",
    ),
)


def _say_the_right_word(cls):
    init, known = cls.__init__, tuple(f.name for f in dataclasses.fields(cls))

    @functools.wraps(init)
    def checked(self, **words):
        refuse_unknown(cls.__name__, words.keys() - set(known), known, _RENAMED)
        init(self, **words)

    cls.__init__ = checked


_say_the_right_word(SamplingParams)


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence between two dispatches: its last token, that token's position, how many more
    tokens may follow, and what its request asked for."""

    token: int
    position: int
    remaining: int
    seed: int
    params: SamplingParams
    stop_ids: tuple[int, ...]
