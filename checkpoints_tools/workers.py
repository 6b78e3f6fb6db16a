"""A few threads, each with an arena of its own: what bounds the memory in flight."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tpjax.errors import RunError

MB = 1 << 20
ARENA = 24 * MB  # more is not faster
SCRATCH = 1 * MB  # what looking for NaNs takes beside the arena
_SLAB = 8 * MB  # read at once: stays in the processor's cache while it is worked on
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Budget:
    """Every worker has one arena of ``arena`` bytes, whatever the size of its weight."""

    workers: int
    arena: int

    @property
    def bytes(self) -> int:
        return self.workers * (self.arena + SCRATCH)


def rows_at_once(arena: int, rows: int, *row_bytes: int) -> int:
    """How many rows are worked on together if each takes these bytes of as many buffers."""
    return min(rows, max(1, _SLAB // row_bytes[0]), arena // sum(row_bytes))


def divide(arena: np.ndarray, rows: int, *row_bytes: int) -> tuple[int, list[np.ndarray]]:
    """An arena as buffers for as many rows as fit: how many, and ``uint8 [n, row_bytes]`` each."""
    count, buffers, at = rows_at_once(len(arena), rows, *row_bytes), [], 0
    for size in row_bytes:
        buffers.append(arena[at : at + count * size].reshape(count, size))
        at += count * size
    return count, buffers


class Workers:
    """Runs a function of (job, arena) over many jobs. The first error ends all of them."""

    def __init__(self, budget: Budget):
        self.budget = budget
        self._stop = threading.Event()
        self._own = threading.local()

    def run(self, function: Callable[[T, np.ndarray], R], jobs: Sequence[T]) -> list[R]:
        def one(job: T) -> R:
            if not hasattr(self._own, "arena"):
                self._own.arena = np.empty(self.budget.arena, np.uint8)
            return function(job, self._own.arena)

        with ThreadPoolExecutor(self.budget.workers) as pool:
            futures = [pool.submit(one, job) for job in jobs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                failed = [f for f in futures if f in done and not f.cancelled() and f.exception()]
                if failed:
                    failed[0].result()
            finally:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        return [future.result() for future in futures]

    def go_on(self) -> None:
        """To be called now and then by the function: ends it if another job has failed."""
        if self._stop.is_set():
            raise RunError("stopped, as another weight failed")
