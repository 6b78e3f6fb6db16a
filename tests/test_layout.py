"""How a weight lies on disk: what is written by `Layout` is a Zarr array that TensorStore reads."""

import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_tools.digests import Digests
from tpjax.checkpoint.layout import MOST_CHUNKS, NUMPY, Layout


def write(folder, layout, x, step):
    """As the converter does: a few rows at a time, each run where it belongs."""
    rows = x.reshape(-1).view(np.uint8).reshape(layout.rows, -1)
    data = bytearray(b"\xff" * layout.data_bytes)
    for first in range(0, layout.rows, step):
        part = rows[first : first + step]
        cut, at = layout.cut(part, np.empty(layout.cut_bytes(len(part)), np.uint8)), 0
        for _, offset, size in layout.runs(first, len(part)):
            data[offset : offset + size] = cut[at : at + size].tobytes()
            at += size
        assert at == len(cut) == layout.cut_bytes(len(part))
    for offset, zeros in layout.padding():
        data[offset : offset + len(zeros)] = zeros
    path = folder / layout.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data + layout.index)
    (folder / "zarr.json").write_bytes(layout.zarr_json)
    assert path.stat().st_size == layout.file_bytes


def values(shape, dtype, seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, NUMPY[dtype].itemsize), np.uint8)
    return bits.view(NUMPY[dtype]).reshape(shape)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


layouts = st.tuples(
    st.lists(st.integers(1, 300), min_size=1, max_size=2),
    st.sampled_from(sorted(NUMPY)),
    st.integers(0, 1),
    st.sampled_from([1, 2, 8, 7]),
    st.integers(1, 301),
)


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_tensorstore_reads_what_was_cut(tmp_path_factory, drawn):
    """Whatever the shape, the axis and the unit, and however few rows are written together."""
    shape, dtype, axis, unit, step = drawn
    layout = Layout.of(tuple(shape), dtype, min(axis, len(shape) - 1), unit)
    folder, x = tmp_path_factory.mktemp("array"), values(shape, dtype)
    write(folder, layout, x, step)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    assert same_bits(tensorstore.open(spec).result().read().result(), x)


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_join_undoes_cut(drawn):
    shape, dtype, axis, unit, step = drawn
    layout = Layout.of(tuple(shape), dtype, min(axis, len(shape) - 1), unit)
    rows = values(shape, dtype).reshape(-1).view(np.uint8).reshape(layout.rows, -1)[:step]
    cut = layout.cut(rows, np.empty(layout.cut_bytes(len(rows)), np.uint8))
    back = np.zeros_like(rows)
    layout.join(cut.copy(), back)
    assert (back == rows).all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("step", [1, 3, 40])
def test_digests_do_not_depend_on_the_rows_together(axis, step):
    """And the chunks' are of the file's bytes."""
    layout = Layout.of((40, 150) if axis else (150, 40), "bfloat16", axis, 1)
    rows = values(layout.shape, "bfloat16").reshape(-1).view(np.uint8).reshape(layout.rows, -1)

    def digest(step):
        digests = Digests(layout)
        for first in range(0, layout.rows, step):
            part = rows[first : first + step]
            digests.add(part, layout.cut(part, np.empty(layout.cut_bytes(len(part)), np.uint8)))
        return digests.finish()

    assert digest(step) == digest(layout.rows)
    assert len(digest(step)[1]) == 16 * layout.chunks == 16 * 75


@pytest.mark.parametrize(
    "size, unit, chunks",
    [
        (14336, 1, 128),  # Llama-3-8B's MLP
        (28672, 1, 128),
        (11008, 1, 128),
        (53248, 1, 128),
        (128256, 1, 128),
        (4096, 128, 32),  # 32 heads
        (1024, 128, 8),
        (16384, 128, 128),
        (32768, 128, 128),  # 256 heads: two together
        (131, 1, 66),  # no power of two divides it
        (50257, 1, 128),
        (96, 1, 96),
        (100, 7, 100),  # not a whole number of units
    ],
)
def test_chunks_end_where_devices_do(size, unit, chunks):
    """At every power of two that divides the units, a device's slice is whole chunks."""
    layout = Layout.of((size, 4), "bfloat16", 0, unit)
    assert layout.chunks == chunks <= MOST_CHUNKS
    units = size // unit
    for degree in (2, 4, 8, 16, 32, 64, 128):
        if size % unit == 0 and units % degree == 0 and chunks >= degree:
            assert size // degree % layout.width == 0, degree


def test_the_index_is_where_the_chunks_are():
    layout = Layout.of((64, 96), "float32", 1, 8)
    entries = np.frombuffer(layout.index, "<u8").reshape(-1, 2)
    assert entries.tolist() == [[n * 64 * 8 * 4, 64 * 8 * 4] for n in range(12)]
