"""Our own kernels for CPUs: the numbers, where they are used, and what happens without."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tpjax
from tests import reference
from tests.families import FAMILIES
from tpjax import native
from tpjax.audit.verdict import Audit
from tpjax.checkpoint.folder import bundled
from tpjax.executables import Executables
from tpjax.ops import attention_ref
from tpjax.ops.attention import as_dtype, held_dtype
from tpjax.ops.attention_ref import Scores

COMPILER = any(map(shutil.which, native.COMPILERS))
needs_it = pytest.mark.skipif(not COMPILER, reason="no C++ compiler here")


@pytest.fixture(autouse=True, scope="module")
def built():
    """Registered in every process that runs any of these."""
    assert native.ready() or not COMPILER, native.why_not()


@needs_it
@settings(max_examples=25, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 20), st.integers(30, 42)),
    features=st.one_of(st.integers(1, 100), st.sampled_from([32, 64, 160])),
    outputs=st.integers(1, 150),
    dtypes=st.sampled_from(["float32 float32", "bfloat16 bfloat16", "float32 bfloat16"]),
    devices=st.sampled_from([1, 8]),
    which=st.integers(0, 2),
)
def test_any_shape(rows, features, outputs, dtypes, devices, which):
    """Tails of vectors, of groups of rows, of panels and of chunks; with helpers and alone; one of
    three matrices."""
    rng = np.random.default_rng([rows, features, outputs])
    x, w = (
        jnp.asarray(rng.normal(size=(*n, features)), dtype)
        for n, dtype in zip(((rows,), (3, outputs)), dtypes.split(), strict=True)
    )
    got = np.asarray(native.product(x, w, which, devices))
    want = np.asarray(x, np.float64) @ np.asarray(w[which], np.float64).T
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= 1e-5 * max(1.0, np.abs(want).max())


@needs_it
@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 bfloat16", "float32 bfloat16"])
def test_many_rows_whose_inputs_come_in_parts(dtypes):
    """More inputs than meet a panel at once, and a tail that fills no vector; sums are added up."""
    rng = np.random.default_rng(0)
    x, w = (
        jnp.asarray(rng.normal(size=(n, 4500)), dtype)
        for n, dtype in zip((43, 70), dtypes.split(), strict=True)
    )
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    assert (
        np.abs(np.asarray(native.product(x, w[None], 0, 1)) - want).max()
        <= 1e-5 * np.abs(want).max()
    )


@needs_it
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_devices_that_help_each_other_compute_the_same(rows):
    """Eight devices on these processors: most of them wait, and work for others while they do."""
    rng = np.random.default_rng(rows)
    mesh = tpjax.make_mesh(tensor=8)
    plan = tpjax.Plan(mesh=mesh)
    for dtype in ("float32", "bfloat16"):
        x, w = (jnp.asarray(rng.normal(size=(n, 512)), dtype) for n in (rows, 8 * 640))
        whole = jax.device_put(x, plan.sharding(None, None))
        split = jax.device_put(w, plan.sharding("mlp", None))
        with jax.set_mesh(mesh):
            product = jax.jit(lambda x, w: native_split(plan, x, w)).lower(whole, split).compile()
        want = np.asarray(native.product(x, w[None], 0, 1))
        for _ in range(30):
            assert (np.asarray(product(whole, split)) == want).all()


def native_split(plan, x, w):
    return jax.shard_map(
        lambda x, w: native.product(x, w[None], 0, 8),
        mesh=plan.mesh,
        in_specs=(plan.spec(None, None), plan.spec("mlp", None)),
        out_specs=plan.spec(None, "mlp"),
        check_vma=False,
    )(x, w)


@needs_it
@pytest.mark.parametrize("rows", [1, 40])
def test_what_is_not_a_number_stays_so(rows):
    x, w = jnp.ones((rows, 40), jnp.bfloat16), jnp.ones((3, 40), jnp.bfloat16)
    w = w.at[0, 39].set(jnp.nan).at[1, 0].set(jnp.inf)
    assert np.asarray(native.product(x, w[None], 0, 1)).tolist()[0][1:] == [np.inf, 40.0]
    assert np.isnan(native.product(x, w[None], 0, 1)[0, 0])


@needs_it
def test_a_matrix_that_is_not_there_is_the_nearest():
    x, w = jnp.ones((1, 40)), jnp.arange(3.0)[:, None, None] * jnp.ones((3, 5, 40))
    assert [float(native.product(x, w, n, 1)[0, 0]) for n in (-7, 1, 3)] == [0, 40, 80]


@needs_it
def test_shapes_that_do_not_fit_are_refused():
    x, w = jnp.ones((1, 40)), jnp.ones((3, 41))
    with pytest.raises(Exception, match="are multiplied"):
        jax.block_until_ready(native.product(x, w[None], 0, 1))


@needs_it
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 5),
    rows=st.integers(1, 3),
    kv=st.integers(1, 3),
    groups=st.integers(1, 9),
    positions=st.integers(1, 90),
    features=st.sampled_from([8, 33, 64, 80, 128]),
    scores=st.sampled_from([Scores(0.1), Scores(0.2, softcap=3.0), Scores(0.1, window=7)]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_attention_of_any_shape(tokens, rows, kv, groups, positions, features, scores, dtype):
    """As the definition has it; what is beyond a sequence's positions is not even read."""
    rng = np.random.default_rng([rows, kv, groups, positions])
    positions, shape = positions + tokens, (rows, tokens, kv * groups, features)
    q = jnp.asarray(rng.normal(size=shape), dtype)
    k, v = (jnp.asarray(rng.normal(size=(rows, kv, positions, features)), dtype) for _ in "kv")
    at = jnp.asarray(rng.integers(0, positions - tokens + 1, rows), jnp.int32)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    want = attention_ref.attend(*wide, at[:, None] + jnp.arange(tokens)[None], scores)
    beyond = jnp.arange(positions)[None, :] >= at[:, None] + tokens
    k, v = (jnp.where(beyond[:, None, :, None], jnp.nan, x) for x in (k, v))
    held = held_dtype(dtype, on_cpu=True)
    got = native.attend(q, as_dtype(k, held), as_dtype(v, held), at, 1, *scores)
    assert got.dtype == q.dtype
    few = 1e-5 if dtype == "float32" else 2e-2
    assert np.abs(np.asarray(got, np.float32) - np.asarray(want)).max() <= few


@needs_it
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scores", [Scores(0.1), Scores(0.1, window=500), Scores(0.1, softcap=3.0)])
@pytest.mark.parametrize("groups, features", [(1, 72), (4, 80), (100, 16)])
def test_attention_of_many_tokens(groups, features, scores, dtype):
    """Several blocks of positions, in the last of which some tokens see nothing; vectors of eight
    and of sixteen features; more heads for one of keys than are taken together."""
    rng = np.random.default_rng(groups)
    tokens, positions, kv = 130 if groups < 100 else 3, 1300, 2
    q = jnp.asarray(rng.normal(size=(2, tokens, kv * groups, features)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(2, kv, positions, features)), dtype) for _ in "kv")
    at = jnp.asarray([470, 1100], jnp.int32)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    want = np.asarray(attention_ref.attend(*wide, at[:, None] + jnp.arange(tokens)[None], scores))
    held = held_dtype(dtype, on_cpu=True)
    got = native.attend(q, as_dtype(k, held), as_dtype(v, held), at, 1, *scores)
    few = 1e-5 if dtype == "float32" else 2**-8  # of the largest: the result is rounded
    assert np.abs(np.asarray(got, np.float32) - want).max() <= few * np.abs(want).max()


@needs_it
def test_attention_that_does_not_fit_is_refused():
    q, k, at = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 3, 8, 8)), jnp.zeros(1, jnp.int32)
    with pytest.raises(Exception, match=r"q\[B,T,N,H\]"):
        jax.block_until_ready(native.attend(q, k, k, at, 1, 1.0))
    with pytest.raises(Exception, match="a cache of its bits"):
        half = k.astype(jnp.bfloat16)
        jax.block_until_ready(native.attend(q[:, :, :3], half, half, at, 1, 1.0))


def times_used(llm: tpjax.LLM, step: str, kernel: str = native.PRODUCT) -> int:
    """In a step compiled anew; which must be what its plan states: no weight copied or widened."""
    exe = Executables(llm.table, llm.executables.buckets)
    compiled = exe.lower(step).compile()
    assert Audit(compiled, exe, step).findings() == []
    return (compiled.as_text() or "").count(f'custom_call_target="{kernel}"')


@needs_it
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.extra)])
def test_where_it_is_used(dtype, quiet):
    """For few rows and for many, of either dtype, with matrices of 16 bits."""
    llm = tpjax.LLM(bundled(), 2, dtype=dtype, max_model_len=64, max_num_seqs=4, **quiet)
    every = 7 * llm.config.layers + 1
    assert times_used(llm, "decode[b1]") == times_used(llm, "decode[b4]") == every
    assert times_used(llm, "prefill[t32]") == every
    for step in ("decode[b4]", "prefill[t32]"):
        assert times_used(llm, step, native.ATTEND) == llm.config.layers


@needs_it
def test_experts_use_it_where_they_are(quiet, tmp_path):
    """Three products of every block, beside four of the layer and the logits; one row of float32
    with so small a matrix is XLA's."""
    FAMILIES["mixtral"]["grouped"].make(tmp_path)
    for dtype in ("float32", "bfloat16"):
        llm = tpjax.LLM(tmp_path, 2, dtype=dtype, max_model_len=64, max_num_seqs=4, **quiet)
        every, one = 7 * llm.config.layers, dtype == "bfloat16"
        assert times_used(llm, "decode[b1]") == one * (every + 1)
        assert times_used(llm, "prefill[t32]") == every + one
        assert times_used(llm, "decode[b4]") == every + 1


def test_one_row_of_float32_only_with_a_large_matrix():
    wide, narrow, half = jnp.float32, jnp.bfloat16, jnp.float16
    assert [native.wins(1, wide, wide, n) for n in (2**20, 2**21)] == [False, True]
    assert native.wins(2, wide, wide, 1) and native.wins(1, narrow, narrow, 1)
    assert native.wins(1, wide, narrow, 1) and not native.wins(1, narrow, wide, 2**30)
    assert native.wins(512, wide, wide, 1) and not native.wins(1, half, half, 2**30)


@needs_it
def test_the_same_tokens_with_and_without(tiny_model, monkeypatch):
    folder, hf = tiny_model()
    params = tpjax.SamplingParams(temperature=0, max_tokens=16)
    prompts = [reference.prompt(n) for n in (5, 9, 20)]
    wanted = [reference.greedy(hf, ids, 16) for ids in prompts]
    for ready in (True, False):
        monkeypatch.setattr(native, "ready", lambda ready=ready: ready)
        llm = reference.load(folder, 2, max_model_len=64, max_num_seqs=4)
        assert (times_used(llm, "decode[b4]") > 0) == ready
        assert [out.outputs[0].token_ids for out in llm.generate(prompts, params)] == wanted


def alone(tmp_path, **env) -> str:
    """What a new process says of the kernel."""
    code = "from tpjax import native; print(native.why_not() or 'ready')"
    usual = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    env = usual | env
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_it
def test_built_for_one_process_where_nothing_can_be_kept(tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("no folder")
    env = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "tmp")}
    assert alone(tmp_path, **env) == "ready"
    assert not list((tmp_path / "tmp").iterdir())


@needs_it
def test_built_once_and_told_why_not(tmp_path):
    assert alone(tmp_path) == "ready"
    (library,) = (tmp_path / "tpjax/native").iterdir()
    made = library.stat().st_mtime_ns
    assert alone(tmp_path) == "ready" and library.stat().st_mtime_ns == made
    assert alone(tmp_path, PATH="/nowhere") == "no C++ compiler (c++, g++, clang++)"
    assert alone(tmp_path, TPJAX_NATIVE="0") == "TPJAX_NATIVE=0 turns it off"
    library.write_bytes(b"no library")
    assert "could not build or load it" in alone(tmp_path)


def test_a_compiler_that_fails_is_told(tmp_path):
    for name in native.COMPILERS:
        script = tmp_path / name
        script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho broken >&2; exit 1\n')
        script.chmod(0o755)
    said = alone(tmp_path, PATH=f"{tmp_path}:/bin")
    assert said == f"{tmp_path}/c++ could not build or load it: broken"
    assert not list((tmp_path / "tpjax/native").iterdir())
