"""What one request may ask of the sampler, checked where it is said. No jax."""

import dataclasses
import functools
from collections.abc import Sequence

from tpjax.errors import UsageError

MAX_LOGPROBS = 20

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
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        checks = (
            (self.temperature >= 0, "temperature", "0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p", "between 0 and 1"),
            (self.top_k >= -1, "top_k", "1 or more, or 0 for all tokens"),
            (self.max_tokens >= 1, "max_tokens", "1 or more"),
            (self.seed is None or 0 <= self.seed < 2**64, "seed", "between 0 and 2**64 - 1"),
            (all(self.stop), "stop", "strings that are not empty"),
            (all(i >= 0 for i in self.stop_token_ids), "stop_token_ids", "token ids, 0 or more"),
            (
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                "logprobs",
                f"between 0 and {MAX_LOGPROBS}",
            ),
        )
        for ok, name, wanted in checks:
            if not ok:
                raise UsageError(f"{name}={getattr(self, name)!r}: must be {wanted}")


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
