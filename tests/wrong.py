"""Wrong programs made of the right one, and how far they then are from transformers.

A mutation is a function of a MonkeyPatch: it leaves a program that runs to its end.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests import reference
from tests.families import FAMILIES
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint import load as loading
from tpjax.executables import Built
from tpjax.models import find
from tpjax.models.registry import FAMILIES as REGISTERED
from tpjax.nn.linear import Linear
from tpjax.nn.norm import RMSNorm
from tpjax.nn.param import value
from tpjax.ops import attention_ref
from tpjax.parallel.mesh import make_mesh
from tpjax.weights import WeightTable

Mutate = Callable[[pytest.MonkeyPatch], Any]
FAST_TO_COMPILE = {"xla_backend_optimization_level": "0"}


class Mutation(NamedTuple):
    """``model``: one of `tests.families`, on which it shows: on this ``mesh``, after this many
    ``tokens`` (usually two chunks, five windows, and more than a growing rope was made for)."""

    model: str
    mutate: Mutate
    mesh: dict[str, int] = {"tensor": 4}
    tokens: int = 60


def started_from(mutations: Iterable[Mutation]) -> dict[str, Mutation]:
    """One mutation for each of the comparisons that these are seen in."""
    return {f"{m.model}, {m.mesh}, {m.tokens}": m for m in mutations}


def every_second(mutations: dict[str, Mutation]) -> list:
    """All as parameters, every second one of them for ``--every-case``."""
    return [
        pytest.param(mutation, id=name, marks=pytest.mark.extra if n % 2 else ())
        for n, (name, mutation) in enumerate(mutations.items())
    ]


class Comparison:
    """``comparison(mutation)``: where that would show, how far the logits of tpjax, as it is at the
    moment of the call, are from transformers'. Every model is made once, in a ``new_folder(name)``.
    """

    def __init__(self, new_folder: Callable[[str], Path]):
        self.new_folder = new_folder
        self.made = functools.cache(self._make)
        self.want = functools.cache(lambda name, ids: reference.logits(self.made(name)[1], ids))

    def _make(self, name: str):
        family, _, variant = name.partition(": ")
        folder = self.new_folder("family")
        return folder, FAMILIES[family][variant].make(folder)

    def __call__(self, mutation: Mutation) -> float:
        folder, _ = self.made(mutation.model)
        ids = reference.prompt(mutation.tokens)
        llm = reference.load(folder, mesh=make_mesh(**mutation.mesh), max_model_len=64)
        exe = llm.executables
        fast = exe.lower("score[t32]").compile(FAST_TO_COMPILE)
        exe.built["score[t32]"] = Built(fast, 0.0, False)
        return reference.distance(llm.logits(ids), self.want(mutation.model, ids))


def facts(**words) -> Mutate:
    """Other facts than the config says; a function makes one of the right facts."""
    right = folders.model_config

    def wrong(raw, where):
        config, family = right(raw, where)
        return _but(config, words), family

    return lambda patch: patch.setattr(folders, "model_config", wrong)


def experts(**words) -> Mutate:
    """Other facts about the mixture of experts."""
    return facts(moe=lambda config: _but(config.moe, words))


def rope(**words) -> Mutate:
    """Other facts about positions."""
    return facts(rope=lambda config: _but(config.rope, words))


def _but(right, words):
    new = {k: make(right) if callable(make) else make for k, make in words.items()}
    return dataclasses.replace(right, **new)


def rewired(change: Callable[[Any], Any]) -> Mutate:
    """``change`` is done to the module of a decoder, its weights already in it."""
    right = WeightTable.module

    def wrong(self, leaves):
        model = right(self, leaves)
        change(model)
        return model

    return lambda patch: patch.setattr(WeightTable, "module", wrong)


def in_blocks(change: Callable[[Any], Any]) -> Mutate:
    """The same, to every block."""
    return rewired(lambda model: [change(block) for block in model.blocks])


def in_names(family: str, one: str, other: str) -> Mutate:
    """Two of a layer's weights take each other's place in a family's table: each then has the
    other's name, or place in a fused tensor."""
    right = find(family, "here")
    swap = {
        f"blocks.{{layer}}.{a}": f"blocks.{{layer}}.{b}" for a, b in [(one, other), (other, one)]
    }
    names = {swap.get(path, path): name for path, name in right.names.items()}
    wrong = dataclasses.replace(right, names=names)
    return lambda patch: patch.setitem(REGISTERED, family, wrong)


def attending(change) -> Mutate:
    """The attention over the cache gets other arguments."""
    attend = attention_ref.attend
    return lambda patch: patch.setattr(
        attention_ref, "attend", lambda *args: attend(*change(*args))
    )


def scoring(change) -> Mutate:
    """The attention's scores are made in another way."""
    return attending(lambda *args: (*args[:-1], args[-1]._replace(**change(args[-1]))))


def row_bias_on_every_device(patch):
    """The bias of a row-parallel product, which counts once, is in every device's partial sum."""
    call = Linear.__call__

    def wrong(self, x, *onto):
        others = self.plan.tensor_degree - 1 if self.out_axis == "embed" else 0
        return call(self, x, *onto) + jnp.float32(others) * value(self.b)[None, None]

    patch.setattr(Linear, "__call__", wrong)


def padding_of_ones(axis: str) -> Mutate:
    """Where weights are padded along ``axis``, they are one and not zero."""
    jobs = loading._jobs

    def wrong(spec, source, tensors, bounds, out, others):
        todo = list(jobs(spec, source, tensors, bounds, out, others))
        if axis in spec.axes:
            out[...] = 1  # what a checkpoint has is read over it
        return todo

    return lambda patch: patch.setattr(loading, "_jobs", wrong)


def norm_is_right(theirs: type, offset: float = 0.0) -> bool:
    """Whether RMSNorm in bfloat16 gives the bits of a class of transformers. One element in a
    thousand may differ: the two square roots do in their last bit, and rarely that decides a
    rounding."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(0, 3, (1, 512, 64)), rng.uniform(0.5, 1.5, 64)
    norm = theirs(64, eps=1e-5).to(torch.bfloat16)
    norm.weight.data = torch.tensor(w, dtype=torch.bfloat16)
    want = norm(torch.tensor(x, dtype=torch.bfloat16)).detach().float().numpy()
    ours = RMSNorm(64, eps=1e-5, dtype="bfloat16", offset=offset)
    ours.w[...] = jnp.asarray(w, jnp.bfloat16)
    graph, state = nnx.split(ours)
    got = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, jnp.asarray(x, jnp.bfloat16))
    return bool(np.mean(np.asarray(got, np.float32) != want) < 1e-3)
