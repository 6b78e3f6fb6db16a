"""Buckets hold every request, caches are updated in place, rows end on the device."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpjax import sampling
from tpjax.bench.decode import bytes_per_step
from tpjax.buckets import Buckets
from tpjax.checkpoint.folder import bundled
from tpjax.config import ModelConfig, MoE
from tpjax.engine.llm import LLM
from tpjax.parallel.mesh import make_mesh
from tpjax.params import Row, SamplingParams
from tpjax.plan import Plan
from tpjax.weights import WeightTable


@given(st.integers(2, 9000), st.integers(1, 70), st.integers(1, 8), st.booleans(), st.data())
def test_buckets_hold_every_request(max_model_len, max_num_seqs, data, fitted, draw):
    buckets = Buckets.make(max_model_len, max_num_seqs, data, fitted)
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


def test_no_other_way_to_cut_a_prompt_takes_less():
    """Where padding costs: a call takes its tokens and eight more, by measurement."""
    fitted = Buckets.make(4096, 1, 1, fitted=True)
    least = [0.0]
    for prompt in range(1, 1200):
        ways = [least[max(0, prompt - size)] + size + 8 for size in fitted.chunks]
        least.append(min(ways))
        assert sum(size + 8 for size in fitted.chunk_sizes(prompt)) == least[prompt], prompt


def test_how_prompts_are_cut():
    fitted, other = (Buckets.make(4096, 1, 1, fitted) for fitted in (True, False))
    for prompt, here, elsewhere in (
        (5, [8], [32]),
        (16, [8, 8], [32]),
        (17, [32], [32]),
        (40, [32, 8], [128]),
        (100, [128], [128]),
        (512 + 300, [512, 128, 128, 32, 8, 8], [512, 512]),
    ):
        assert fitted.chunk_sizes(prompt) == here and other.chunk_sizes(prompt) == elsewhere


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


def test_stop_ids_and_counts_end_a_row_on_the_device(llm):
    """Without a word from the host: -1 after a stop id, after ``remaining`` or ``wanted`` tokens,
    and in an empty row."""
    exe = llm.executables
    params = SamplingParams(temperature=1.0)

    def run(stop_ids: tuple[int, ...], remaining: int, wanted: int):
        row = Row(5, 0, remaining, 7, params, stop_ids)
        packed = exe.upload(sampling.pack([row, None, row]))
        limit = exe.upload(np.asarray(wanted, np.int32))
        _, drawn, _ = exe["decode[b3]"](llm.weights, exe["zeros[b3]"](), packed, limit)
        tokens = np.asarray(drawn.token_B)
        assert (tokens[:, 1] == -1).all() and (tokens[:, 0] == tokens[:, 2]).all()
        return tokens[:, 0].tolist()

    free = run((), 32, 32)
    assert -1 not in free
    at = next(i for i in range(3, 32) if free[i] not in free[:i])
    assert run((free[at],), 32, 32) == free[: at + 1] + [-1] * (31 - at)
    assert run((), 9, 32) == free[:9] + [-1] * 23
    assert run((), 32, 4) == free[:4] + [-1] * 28


def test_a_device_knows_what_it_is_asked_next(llm):
    """As the host would say it once it had seen the tokens: some rows go on, one has drawn a stop
    id, one has made all its tokens, one was empty."""
    exe = llm.executables
    params = SamplingParams(temperature=1.0)

    def dispatch(rows: list[Row | None], wanted: int):
        packed = exe.upload(sampling.pack(rows))
        decode, cache, limit = exe["decode[b3]"], exe["zeros[b3]"](), exe.number(wanted)
        _, drawn, packed = decode(llm.weights, cache, packed, limit)
        return np.asarray(drawn.token_B), np.asarray(packed)

    for wanted in (1, 5):
        free, _ = dispatch([Row(5, 3, 20, 7, params, ())] * 3, wanted)
        stop = (int(free[wanted - 1, 0]),)
        rows = [
            Row(5, 3, 20, 7, params, ()),
            Row(5, 3, 20, 7, params, stop),
            Row(9, 6, wanted, 8, params, (1, 2)),
        ]
        for order in (rows, [None, *rows[:2]], [rows[2], None, None]):
            made, asked = dispatch(order, wanted)
            want = sampling.pack(order)
            for n, row in enumerate(order):
                if row is None:
                    assert (asked[n] == want[n]).all()
                    continue
                tokens = made[:, n][made[:, n] >= 0]
                ended = tokens[-1] in row.stop_ids
                want[n, :3] = tokens[-1], row.position + len(tokens), row.remaining - len(tokens)
                want[n, 2] *= not ended
                assert (asked[n] == want[n]).all()
        assert (made == -1).sum() > 0


def test_bytes_of_a_decode_step_count_the_experts_chosen():
    """Of 8 experts one sequence reads 2, four sequences 8 (1 - (3/4)^4) on average."""
    sizes = dict(vocab=16, embed=8, layers=1, heads=2, kv_heads=2, head_dim=4, mlp=8)
    moe = MoE(experts=8, per_token=2, mlp=32, layers=(True,))
    config = ModelConfig(family="mixtral", tie_embeddings=True, moe=moe, **sizes)
    for tensor in (1, 2):
        table = WeightTable(config, Plan(mesh=make_mesh(tensor=tensor)).fit(config))
        experts = 3 * 8 * 32 * 8 * 4
        copied = (2 * 8 + 8 * 8) * 4 * (tensor - 1)  # norms and router, on every device
        copied += 8 * 4 * (tensor - 1)
        for batch, share in ((1, 1 / 4), (4, 1 - (3 / 4) ** 4)):
            buckets = Buckets.make(32, batch, 1)
            llm = SimpleNamespace(
                config=config,
                table=table,
                plan=table.plan,
                executables=SimpleNamespace(buckets=buckets),
            )
            others = table.parameters * 4 - experts + copied
            cache = 2 * batch * 32 * 8 * 4
            assert bytes_per_step(llm, batch, buckets.context) == pytest.approx(
                others + experts * share + cache, abs=8
            )


def test_what_is_expected_is_built_while_weights_load(quiet):
    """One prompt or many, as `generate` takes them, which then builds nothing more."""
    for expect in ("hello", ["a", "b"]):
        llm = LLM(bundled(), 1, expect=expect, max_model_len=64, **quiet)
        built = set(llm.executables.built)
        assert built
        llm.generate(expect, SamplingParams(max_tokens=2))
        assert set(llm.executables.built) == built
