"""The engine: prompts are prefilled one per replica, put into a free row, and decoded together.

A row that finishes is refilled from the queue between two dispatches. What a request computes in
prefill never depends on the others; in decode, rows share a matrix product and the length of their
caches, which are as long as the longest needs.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from tpjax import sampling
from tpjax.buckets import DISPATCH
from tpjax.cache import KVCache
from tpjax.engine.request import Logprob, Request
from tpjax.errors import RunError
from tpjax.executables import Executables
from tpjax.ops.sample import NOT_A_NUMBER, Drawn

Group = dict[int, tuple[int, Request]]  # by replica: a row of the cache, and who is to have it
LOOK_AHEAD = 32  # waiting requests per replica that may be taken out of turn
WAITED_FOR = 8  # tokens per dispatch while a queue, or a stop string, waits for the result


@dataclass(frozen=True)
class Dispatch:
    """Tokens that a device is making or has made: of whom, and with what they go on."""

    slots: list[Request | None]
    drawn: Drawn
    packed: jax.Array


class Engine:
    """Runs requests to their end on built executables. Reading results is the only wait."""

    def __init__(self, weights: tuple[jax.Array, ...], executables: Executables):
        self.weights, self.exe = weights, executables
        self.data = executables.one

    def run(self, requests: Sequence[Request], *, tokens: int | None = None) -> Iterator[Request]:
        """Run all requests, yielding each one whenever it has new tokens. ``tokens``: how many per
        dispatch; None is as many as nobody waits for. With ``tokens``, while none waits for a row,
        the next dispatch is on its way before the tokens of one are read, so that devices do not
        wait for the host."""
        for request in requests:
            request.start()
        waiting = deque(requests)
        batch = self.exe.buckets.batch_for(len(requests))
        slots: list[Request | None] = [None] * batch
        # Where sequences are decoded, and where prompts are prefilled; of one row, the same.
        longest = max(request.context for request in requests)
        cache: KVCache | None = self._zeros(batch, longest) if batch > 1 else None
        one: KVCache | None = None
        flying: Dispatch | None = None
        refilled = False  # since then
        while waiting or any(slots):
            while waiting and None in slots:
                group = self._next_group(waiting, slots)
                context = next(request.context for _, request in group.values())
                if one is not None and one.context != context:
                    one = None  # there need not be room for two
                    cache = None if batch == 1 else cache
                one, drawn = self._prefill(one or self._zeros(self.data, context), group)
                if batch == 1:
                    cache = one
                else:
                    assert cache is not None
                    cache = self._insert(cache, one, group, batch)
                for replica, (slot, request) in group.items():
                    self._accept(request, drawn, replica)
                    slots[slot] = self._going_on(request, waiting)
                    yield request
                refilled = True
            live = [r for r in slots if r]
            if live:
                assert cache is not None
                wanted = tokens or self._tokens_per_dispatch(live, bool(waiting))
                if flying is None:
                    cache, flying = self._dispatch(cache, list(slots), wanted)
                    refilled = False
                landed, flying = flying, None
                if tokens and not (waiting or refilled):
                    cache, flying = self._dispatch(cache, landed.slots, wanted, after=landed)
                if batch == 1:
                    one = cache
                drawn = self._read(landed)
                for slot, request in enumerate(landed.slots):
                    if request and request is slots[slot]:
                        self._accept(request, drawn, slot)
                        slots[slot] = self._going_on(request, waiting)
                        yield request

    def _going_on(self, request: Request, waiting: deque) -> Request | None:
        """The request if it keeps its row. One whose keys have to be rotated anew is prefilled
        again, before all that wait."""
        if request.finish_reason is None and request.crosses:
            waiting.appendleft(request)
            return None
        return None if request.finish_reason else request

    def _tokens_per_dispatch(self, live: list[Request], queue: bool) -> int:
        return WAITED_FOR if queue or any(r.params.stop for r in live) else DISPATCH

    def _next_group(self, waiting: deque, slots: list) -> Group:
        """At most one request per replica, each with a free row of that replica. Only prompts that
        are cut into the same chunks, with caches of the same length, go together, so that each is
        computed as it would be alone."""
        per_replica = len(slots) // self.data
        free = {}
        for replica in range(self.data):
            rows = range(replica * per_replica, (replica + 1) * per_replica)
            row = next((row for row in rows if slots[row] is None), None)
            if row is not None:
                free[replica] = row
        shape = self._shape(waiting[0])
        near = enumerate(itertools.islice(waiting, LOOK_AHEAD * self.data))
        alike = itertools.islice((i for i, r in near if self._shape(r) == shape), len(free))
        group = {}
        for (replica, row), i in zip(free.items(), list(alike), strict=False):
            i -= len(group)  # those before it have left the queue
            group[replica] = (row, waiting[i])
            del waiting[i]
        return group

    def _shape(self, request: Request) -> tuple[int, list[int]]:
        """Positions of its cache, and the chunks it is prefilled in."""
        return request.context, self.exe.buckets.chunk_sizes(request.length)

    def _zeros(self, rows: int, context: int) -> KVCache:
        return self.exe[self.exe.name("zeros", rows, context)]()

    def _prefill(self, one: KVCache, group: Group) -> tuple[KVCache, Drawn]:
        """All chunks of the group's prompts; returns the cache and the tokens that follow them."""
        rows = [group[r][1].prompt_row() if r in group else None for r in range(self.data)]
        packed = self.exe.upload(sampling.pack(rows))
        start, drawn = 0, None
        length = np.ones(self.data, np.int32)
        for replica, (_, request) in group.items():
            length[replica] = request.length
        length = self.exe.upload(length)
        _, chunks = self._shape(next(iter(group.values()))[1])
        for size in chunks:
            token = np.zeros((self.data, size), np.int32)
            count = np.ones(self.data, np.int32)
            for replica, (_, request) in group.items():
                part = request.ids[start : start + size]
                token[replica, : len(part)] = part
                count[replica] = len(part)
            begin = np.full(self.data, start, np.int32)
            args = map(self.exe.upload, (token, begin, count))
            prefill = self.exe[self.exe.name("prefill", size, one.context)]
            one, drawn = prefill(self.weights, one, *args, length, packed)
            start += size
        return one, jax.tree.map(lambda x: x[None], jax.device_get(drawn))

    def _insert(self, cache: KVCache, one: KVCache, group: Group, batch: int) -> KVCache:
        per_replica = batch // self.data
        slot = np.full(self.data, -1, np.int32)
        for replica, (row, _) in group.items():
            slot[replica] = row - replica * per_replica
        insert = self.exe[self.exe.name("insert", batch, cache.context, one.context)]
        return insert(cache, one, self.exe.upload(slot))

    def _dispatch(self, cache: KVCache, slots: list, wanted: int, after: Dispatch | None = None):
        """Have the devices make tokens, after those of another dispatch that may still be running;
        returns the cache and what will be there."""
        batch = len(slots)
        if after is None:
            packed = self.exe.upload(sampling.pack([r.row() if r else None for r in slots]))
        else:
            packed = after.packed
        limit = self.exe.number(min(wanted, DISPATCH))
        decode = self.exe[self.exe.name("decode", batch, cache.context)]
        cache, drawn, packed = decode(self.weights, cache, packed, limit)
        return cache, Dispatch(slots, drawn, packed)

    def _read(self, landed: Dispatch) -> Drawn:
        """What was drawn, on the host; logprobs only if somebody has asked for them."""
        drawn = landed.drawn
        if any(r is not None and r.params.logprobs is not None for r in landed.slots):
            return jax.device_get(drawn)
        token_B = drawn.token_B
        if token_B.is_fully_replicated:  # one device's copy is read in half the time
            token_B = token_B.addressable_data(0)
        return replace(drawn, token_B=np.asarray(token_B))

    def _accept(self, request: Request, drawn: Drawn, row: int) -> None:
        """Give a request the tokens of its row, in order, until it finishes."""
        for n, token in enumerate(drawn.token_B[:, row].tolist()):
            if request.finish_reason or token == -1:
                return
            if token == NOT_A_NUMBER:
                raise RunError(
                    f"request {request.id}: the logits are not numbers at position"
                    f" {request.length}; the weights overflow in"
                    " this dtype, try dtype=bfloat16 or float32"
                )
            request.accept(token, _logprobs(request, drawn, n, row, token))


def _logprobs(request: Request, drawn: Drawn, n: int, row: int, token: int):
    wanted = request.params.logprobs
    if wanted is None:
        return None
    decode = request.tokenizer.decode if request.tokenizer else lambda ids: None  # type: ignore
    ids = drawn.top_id_BN[n, row].tolist()
    values = drawn.top_logprob_BN[n, row].tolist()
    out = {}
    for rank, (id_, logprob) in enumerate(zip(ids[:wanted], values, strict=False), 1):
        if id_ >= 0:
            out[id_] = Logprob(logprob, rank, decode([id_]))
    if token not in out:
        rank = ids.index(token) + 1 if token in ids else None
        out[token] = Logprob(float(drawn.logprob_B[n, row]), rank, decode([token]))
    return out
