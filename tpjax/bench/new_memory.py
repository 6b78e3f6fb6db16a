"""How long the system takes to give a process so much memory, in seconds: the limit that loading
onto a CPU runs against. A virtual machine gives what lay idle back to its host and must get it
again, which can take longer than everything else of a start (BENCHMARKS.md, "Start").
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tpjax.checkpoint.room import Room

_PIECE = 1 << 22  # bytes a thread takes at a time
_PAGE = 1 << 12
_IDLE = 3  # seconds the last process's memory lies idle, as it has where somebody starts a model


def main() -> None:
    """Print the seconds for as many bytes as the first argument says."""
    size = int(sys.argv[1])
    time.sleep(_IDLE)
    start = time.perf_counter()
    memory = Room([size]).empty((size,), np.dtype(np.uint8))

    def touch(begin: int) -> None:
        memory[begin : begin + _PIECE : _PAGE] = 1

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(touch, range(0, size, _PIECE)))
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
