"""The product of one row as GPUs run it, here on CPU devices: the same numbers, norm and sum in it.

The kernels it becomes are in test_kernels.py."""

import jax
import numpy as np
import pytest

import tpjax
from tests import reference
from tests.families import FAMILIES
from tpjax.nn import linear
from tpjax.ops.matmul import RootMeanSquare, matvec
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan

GREEDY = tpjax.SamplingParams(temperature=0, max_tokens=16)
MESHES = [{"tensor": 1}, {"tensor": 4}, {"data": 2, "tensor": 4}]
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("axes", [("heads", "embed"), ("embed", "heads")], ids=["column", "row"])
@pytest.mark.parametrize("normed", [False, True])
def test_one_row(sizes, axes, normed):
    """With what it is added to, and normalised where its input is whole on every device."""
    if normed and axes[1] == "heads":
        pytest.skip("a norm is over all features")
    plan, rows = Plan(mesh=make_mesh(**sizes)), sizes.get("data", 1)
    x, w, scale, onto = (
        RNG.normal(size=s).astype(np.float32) for s in ((rows, 64), (32, 64), (64,), (rows, 32))
    )
    put = lambda array, *axes: jax.device_put(array, plan.sharding(*axes))  # noqa: E731
    norm = RootMeanSquare(put(scale, None), 1e-5) if normed else None

    @jax.jit
    def run(x, w, onto):
        y = matvec(plan, x, w, *axes, norm, onto)
        return plan.sum(y, plan.mesh_axes(axes[1]), "batch", axes[0])

    with jax.set_mesh(plan.mesh):
        args = put(x, "batch", axes[1]), put(w, *axes), put(onto, "batch", axes[0])
        got = np.asarray(run(*args))
    if normed:
        x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + 1e-5) * scale
    assert np.abs(got - (x @ w.T + onto)).max() < 1e-4


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(linear, "_in_one_kernel", linear.alone)


def _cases():
    """By default one family with each kind of norm and of sum."""
    for family in FAMILIES:
        for tensor in (1, 4):
            usual = tensor == 4 and family in ("llama", "gemma2", "opt")
            marks = () if usual else pytest.mark.extra
            yield pytest.param(family, tensor, marks=marks)


@pytest.mark.parametrize("family, tensor", list(_cases()))
def test_generated_alone(tmp_path, as_on_a_gpu, family, tensor):
    """Every family decodes a single sequence as transformers does, in float32."""
    tiny = next(iter(FAMILIES[family].values()))
    hf = tiny.make(tmp_path)
    llm = reference.load(tmp_path, tensor=tensor, max_model_len=64, max_num_seqs=1)
    ids, wanted = reference.prompt_and_greedy(hf, 9, 16)
    (out,) = llm.generate([ids], GREEDY)
    assert out.outputs[0].token_ids == wanted


def test_every_part_of_it_counts(as_on_a_gpu, monkeypatch, tiny_model):
    """Without the norm, or without what the product is added to, the tokens are others."""
    folder, hf = tiny_model()
    ids, wanted = reference.prompt_and_greedy(hf, 9, 16)
    right = linear.matvec

    def tokens(wrong) -> list[int]:
        monkeypatch.setattr(linear, "matvec", wrong)
        llm = reference.load(folder, tensor=4, max_model_len=64, max_num_seqs=1)
        return llm.generate([ids], GREEDY)[0].outputs[0].token_ids

    assert tokens(right) == wanted
    assert tokens(lambda *args: right(*args[:-1], None)) != wanted
    assert tokens(lambda *args: right(*args[:-2], None, args[-1])) != wanted
