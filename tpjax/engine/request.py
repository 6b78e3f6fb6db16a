"""A request on the host: its tokens so far, its text so far, and when it is finished. No jax."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from tpjax.params import Row, SamplingParams

_CONTINUED = 32  # prompt tokens that decoding looks back at


class Tokenizer(Protocol):
    """What the engine needs of transformers' tokenizers."""

    @property
    def backend_tokenizer(self) -> Backend: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Logprob:
    """Natural log of a token's probability; ``rank`` counts from 1, None if not in the list."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass(frozen=True)
class Timings:
    """Seconds. Tokens per second are this request's own, the first token excluded."""

    time_to_first_token: float
    total: float
    tokens_per_second: float


@dataclass(frozen=True)
class CompletionOutput:
    """One completion; attribute names are vLLM's. ``finish_reason`` is "stop" or "length";
    ``stop_reason`` the stop string or stop token id that ended it, None for end-of-sequence."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request; attribute names are vLLM's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    timings: Timings
    finished: bool = True


class Detokenizer:
    """Tokens in, text out, never half a character: bytes wait until they are whole (and are left
    out if that never happens), and the end of the text waits while it could be the beginning of a
    stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], prompt_ids: Sequence[int] = ()):
        self._backend = tokenizer.backend_tokenizer
        # Decoding goes on from the prompt: some tokenizers drop a space at the start of a text,
        # and this is not the start. A prompt that ends within a character is not continued.
        before = list(prompt_ids[-_CONTINUED:])
        if self._backend.decode(before).endswith("\N{REPLACEMENT CHARACTER}"):
            before = []
        self._stream = DecodeStream(before, skip_special_tokens=True)
        self._stop = stop
        self.text = ""
        self.stopped_by: str | None = None
        self._shown = 0

    def push(self, token: int) -> bool:
        """Add a token; True when a stop string is complete (and cut off)."""
        try:
            piece = self._stream.step(self._backend, token)
        except Exception:
            # Bytes that are no character can make a tokenizer rewrite what it said before; the
            # library raises its base class for that. Text goes on after them.
            self._stream = DecodeStream(skip_special_tokens=True)
            piece = self._stream.step(self._backend, token)
        if not piece:
            return False
        searched = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += piece
        found = [(at, s) for s in self._stop if (at := self.text.find(s, searched)) >= 0]
        if not found:
            return False
        at, self.stopped_by = min(found)
        self.text = self.text[:at]
        return True

    def new_text(self, finished: bool) -> str:
        """What may be shown now and was not before."""
        end = len(self.text)
        if not finished:
            end -= max((_overlap(self.text, s) for s in self._stop), default=0)
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0


@dataclass
class Request:
    """One prompt and what has become of it."""

    id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    eos_ids: tuple[int, ...]
    max_tokens: int  # what params ask for and max_model_len leaves
    context: int  # positions of the cache it is computed in, whoever else runs
    tokenizer: Tokenizer | None
    recomputed_at: int | None = None  # see `tpjax.rope.Rope`
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[dict[int, Logprob]] = field(default_factory=list[dict[int, Logprob]])
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self):
        eos = () if self.params.ignore_eos else self.eos_ids
        self.stop_ids = tuple(dict.fromkeys((*eos, *self.params.stop_token_ids)))
        self._eos = set(eos)
        self.detokenizer = None
        if self.tokenizer is not None:
            self.detokenizer = Detokenizer(self.tokenizer, self.params.stop, self.prompt_ids)
        self._started = self._first = self._last = 0.0

    def start(self) -> None:
        """The clock of the timings starts: everything is compiled, nothing has run."""
        self._started = time.perf_counter()

    @property
    def ids(self) -> list[int]:
        """The prompt and what was made of it so far."""
        return self.prompt_ids + self.token_ids

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def crosses(self) -> bool:
        """Whether the sequence has just become so long that it has to be prefilled again."""
        return self.recomputed_at is not None and self.length == self.recomputed_at + 1

    def prefilled(self) -> list[int]:
        """The lengths that may have to be prefilled, now and later."""
        at = self.recomputed_at
        again = at is not None and self.length <= at < self.length + self.max_tokens
        return [self.length, at + 1] if at is not None and again else [self.length]

    def row(self) -> Row:
        """What the device needs to go on: the last token has been drawn but not yet been read."""
        remaining = self.max_tokens - len(self.token_ids)
        if self.recomputed_at is not None and self.length <= self.recomputed_at:
            remaining = min(remaining, self.recomputed_at + 1 - self.length)
        return Row(
            token=self.token_ids[-1],
            position=self.length - 1,
            remaining=remaining,
            seed=self.seed,
            params=self.params,
            stop_ids=self.stop_ids,
        )

    def prompt_row(self) -> Row:
        """The same before the first token; position and remaining come from the prompt's chunks."""
        return Row(0, 0, 0, self.seed, self.params, self.stop_ids)

    def accept(self, token: int, logprobs: dict[int, Logprob] | None) -> None:
        """One more token. Sets ``finish_reason`` when it was the last one."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.token_ids.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if token in self.stop_ids:
            self.finish_reason = "stop"
            self.stop_reason = None if token in self._eos else token
        elif self.detokenizer and self.detokenizer.push(token):
            self.finish_reason = "stop"
            self.stop_reason = self.detokenizer.stopped_by
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"

    def new_text(self) -> str:
        """Text made since the last call, as far as it is settled."""
        return self.detokenizer.new_text(self.finish_reason is not None) if self.detokenizer else ""

    def output(self) -> RequestOutput:
        """The result, once finished."""
        assert self.finish_reason is not None
        text = self.detokenizer.text if self.detokenizer else ""
        logprobs = self.logprobs if self.params.logprobs is not None else None
        completion = CompletionOutput(
            0, text, self.token_ids, logprobs, self.finish_reason, self.stop_reason
        )
        spent = self._last - self._first
        timings = Timings(
            time_to_first_token=self._first - self._started,
            total=self._last - self._started,
            tokens_per_second=(len(self.token_ids) - 1) / spent if spent > 0 else 0.0,
        )
        return RequestOutput(self.id, self.prompt, self.prompt_ids, [completion], timings)
