"""Which requests are prefilled together: no device is needed to know."""

from collections import deque
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from tpjax.buckets import Buckets
from tpjax.engine.engine import Engine


@given(
    st.lists(
        st.tuples(st.integers(1, 600), st.sampled_from((1024, 4096))), min_size=1, max_size=150
    ),
    st.integers(1, 4),
    st.lists(st.booleans(), min_size=8, max_size=8).filter(any),
)
def test_groups_take_every_request_once_and_only_alike_together(asked, data, free):
    """The first in the queue always goes, into a free row of its own replica, with others that are
    cut into the same chunks and have caches of the same length."""
    buckets = Buckets.make(4096, 8, data)
    engine = Engine((), SimpleNamespace(one=data, buckets=buckets))  # type: ignore[arg-type]
    rows = 8 // data * data
    slots = [None if f else object() for f in free[:rows]]
    waiting = deque(
        SimpleNamespace(number=i, length=n, context=context) for i, (n, context) in enumerate(asked)
    )
    taken = []
    while waiting and None in slots:
        first = waiting[0]
        group = engine._next_group(waiting, slots)  # type: ignore[arg-type]
        assert first in [request for _, request in group.values()]
        shapes = {(r.context, *buckets.chunk_sizes(r.length)) for _, r in group.values()}
        assert len(shapes) == 1
        for replica, (row, _) in group.items():
            assert slots[row] is None and row // (rows // data) == replica
        taken += [request.number for _, request in group.values()]
        assert not {request.number for request in waiting} & set(taken)
    assert sorted(taken) == (list(range(len(asked))) if None in slots else [])
