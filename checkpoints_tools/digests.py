"""The digests of one weight, of rows that pass by in order."""

import numpy as np
import xxhash

from tpjax.checkpoint.layout import Layout


class Digests:
    """xxh3-128 of the weight in C order and xxh3-64 of each of its chunks."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self._whole = xxhash.xxh3_128()
        self._chunks = [xxhash.xxh3_64() for _ in range(layout.chunks)]
        self._next = 0

    def add(self, rows: np.ndarray, cut: np.ndarray) -> None:
        """The next rows, ``uint8 [n, row_bytes]``, and the same as `Layout.cut` has them."""
        self._whole.update(rows.reshape(-1).data)
        at = 0
        for chunk, _, size in self.layout.runs(self._next, len(rows)):
            self._chunks[chunk].update(cut[at : at + size].data)
            at += size
        self._next += len(rows)

    def finish(self) -> tuple[str, str]:
        """(the weight's, the chunks' joined), once all rows have been added."""
        assert self._next == self.layout.rows
        for _, zeros in self.layout.padding():
            self._chunks[-1].update(zeros)
        return self._whole.hexdigest(), "".join(c.hexdigest() for c in self._chunks)
