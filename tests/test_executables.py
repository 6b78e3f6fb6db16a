"""Buckets: whatever the sizes, every prompt fits and every batch has a bucket."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpjax.checkpoint.folder import bundled
from tpjax.engine.llm import LLM
from tpjax.executables import Buckets


@given(st.integers(2, 9000), st.integers(1, 70), st.integers(1, 8), st.data())
def test_buckets_hold_every_request(max_model_len, max_num_seqs, data, draw):
    buckets = Buckets.make(max_model_len, max_num_seqs, data)
    assert buckets.context >= max_model_len
    prompt = draw.draw(st.integers(1, max_model_len))
    start = 0
    for size in buckets.chunk_sizes(prompt):
        # A write beyond the context would be moved back and overwrite what is there.
        assert size in buckets.chunks and start + size <= buckets.context
        start += size
    assert start >= prompt
    assert all(b % data == 0 for b in buckets.batch) and list(buckets.batch) == sorted(
        set(buckets.batch)
    )
    assert max_num_seqs <= buckets.batch[-1] < max_num_seqs + data
    for sequences in range(1, max_num_seqs + 1):
        assert buckets.batch_for(sequences) >= sequences


@pytest.fixture(scope="module")
def llm():
    return LLM(bundled(), 4, max_model_len=40, max_num_seqs=3, say=lambda line: None)


def test_every_cache_is_updated_in_place(llm):
    """Prefill, insert and decode return the cache they were given, not a copy."""
    exe = llm.executables
    for name, rows in (("prefill[t32]", 1), ("insert[b3]", 3), ("decode[b3]", 3)):
        memory = exe.lower(name).compile().memory_analysis()
        per_row = llm.config.kv_bytes_per_token * exe.buckets.context // 4
        assert memory.alias_size_in_bytes == rows * per_row, name


def test_the_memory_check_bounds_what_prefill_needs(llm):
    memory = llm.executables.lower("prefill[t32]").compile().memory_analysis()
    assert memory.temp_size_in_bytes <= llm.memory.temporary
