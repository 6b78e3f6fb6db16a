"""Mixtures of experts cannot be computed in another way unnoticed: each of these wrong programs
runs to its end, on four devices, and its logits are not transformers'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import TOLERANCE
from tests.wrong import (
    Mutation,
    every_second,
    experts,
    facts,
    in_blocks,
    in_names,
    padding_of_ones,
    started_from,
)
from tpjax.nn import moe
from tpjax.ops import experts as island
from tpjax.ops.experts import _Blocks
from tpjax.plan import Plan

on_four = functools.partial(Mutation, mesh={"expert": 2, "tensor": 2})


def routing(change):
    """Tokens go to other experts, or count otherwise."""
    route = island.route

    def wrong(x, router, *how):
        return change(*route(x, router, *how), router.shape[0])

    return lambda patch: patch.setattr(island, "route", wrong)


def sigmoid_for_softmax(patch):
    def wrong(x, router, per_token, renormalise):
        share, expert = jax.lax.top_k(jax.nn.sigmoid(island.tiles.dot(x, router)), per_token)
        return expert, share / jnp.sum(share, axis=-1, keepdims=True)

    patch.setattr(island, "route", wrong)


def padded_experts_chosen(patch):
    """Experts that only fill up the last device take part in the choice."""
    route = island.route
    wrong = lambda x, router, *how: route(x, jnp.pad(router, ((0, 2), (0, 0))), *how)  # noqa: E731
    patch.setattr(island, "route", wrong)


def running(change):
    """What the devices are told: which experts, which of them are here, and the shares."""
    call = _Blocks.__call__

    def wrong(self, x, weights, expert, mine, share, act):
        expert, mine, share = change(expert, mine, share, weights.gate_EFD.shape[0])
        return call(self, x, weights, expert, mine, share, act)

    return lambda patch: patch.setattr(_Blocks, "__call__", wrong)


def every_pair_everywhere(expert, mine, share, here):
    """As if the experts here were all there are."""
    return expert % here, jnp.ones_like(mine), share


def numbers_of_the_first_device(expert, mine, share, here):
    """Every device runs the experts that the first one has, with its own weights."""
    expert = expert + jax.lax.axis_index("expert") * here
    return expert, expert < here, share


def sum_without_the_expert_axis(patch):
    right = Plan.sum

    def wrong(self, y, partial, *axes, onto=None):
        if "expert" not in partial:
            return right(self, y, partial, *axes, onto=onto)
        others = tuple(axis for axis in partial if axis != "expert")
        specs = {"in_specs": self.spec(*axes, partial=partial), "out_specs": self.spec(*axes)}
        y = jax.shard_map(lambda mine: jax.lax.psum(mine, others), **specs, check_vma=False)(y)
        return y if onto is None else y + onto

    patch.setattr(Plan, "sum", wrong)


def shared_gate_forgotten(block):
    block.moe.shared_gate = lambda x: jnp.full_like(x[..., :1], 100.0)


def shared_expert_on_every_device(patch):
    product = moe.product
    wrong = lambda plan, x, *rest: product(plan, x * float(plan.tensor_degree), *rest)  # noqa: E731
    patch.setattr(moe, "product", wrong)


def shared_expert_dropped(patch):
    product = moe.product
    patch.setattr(moe, "product", lambda plan, x, *rest: product(plan, x * 0.0, *rest))


MUTATIONS = {
    "not_renormalised": on_four("mixtral: grouped", experts(renormalise=False)),
    # Of renormalised shares a softmax over the chosen is the same; of others it is not.
    "softmax_over_the_chosen": on_four("qwen2_moe: all sparse", experts(renormalise=True)),
    "renormalised": on_four("qwen3_moe: not renormalised, some dense", experts(renormalise=True)),
    "one_expert_more": on_four("mixtral: grouped", experts(per_token=3)),
    "one_expert_less": on_four("mixtral: three of five", experts(per_token=2)),
    "sigmoid_for_softmax": on_four("mixtral: grouped", sigmoid_for_softmax),
    "shares_forgotten": on_four(
        "mixtral: grouped", routing(lambda expert, share, E: (expert, share * 0 + 0.5))
    ),
    "shares_of_each_other": on_four(
        "mixtral: grouped", routing(lambda expert, share, E: (expert, share[:, ::-1]))
    ),
    "experts_shifted_by_one": on_four(
        "mixtral: grouped", routing(lambda expert, share, E: ((expert + 1) % E, share))
    ),
    "padded_experts_chosen": Mutation("mixtral: grouped", padded_experts_chosen, {"expert": 4}),
    "experts_padded_with_ones": Mutation(
        "qwen2_moe: all sparse", padding_of_ones("expert_mlp"), {"tensor": 3}
    ),
    "w1_and_w3_swapped": on_four("mixtral: grouped", in_names("mixtral", "moe.gate", "moe.up")),
    "gelu_for_silu": on_four("mixtral: grouped", facts(act="gelu")),
    "every_pair_everywhere": on_four("mixtral: grouped", running(every_pair_everywhere)),
    "numbers_of_the_first_device": on_four(
        "mixtral: grouped", running(numbers_of_the_first_device)
    ),
    "sum_without_the_expert_axis": on_four("mixtral: grouped", sum_without_the_expert_axis),
    "shared_gate_forgotten": on_four("qwen2_moe: all sparse", in_blocks(shared_gate_forgotten)),
    "shared_expert_on_every_device": on_four(
        "qwen2_moe: all sparse", shared_expert_on_every_device
    ),
    "shared_expert_dropped": on_four("qwen2_moe: all sparse", shared_expert_dropped),
}
RIGHT = started_from(MUTATIONS.values())


@pytest.mark.parametrize("mutation", every_second(RIGHT))
def test_unmutated(apart, mutation):
    """The programs these mutations start from agree."""
    assert apart(mutation) <= TOLERANCE


@pytest.mark.parametrize("mutation", every_second(MUTATIONS))
def test_mutation_is_caught(apart, monkeypatch, mutation):
    mutation.mutate(monkeypatch)
    assert apart(mutation) > TOLERANCE


WHOLE = functools.partial(island.tiles.product, on_cpu=False)
KERNELS = {"pairs": lambda _: island._pairs, "blocks without tiles": lambda _: _Blocks(WHOLE)}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_what_only_accelerators_run(apart, monkeypatch, kernel):
    """It is right as well, and wrong where it should be."""
    monkeypatch.setattr(island, "_Blocks", kernel)
    mutation = MUTATIONS["shares_of_each_other"]
    assert apart(mutation) <= TOLERANCE
    mutation.mutate(monkeypatch)
    assert apart(mutation) > TOLERANCE


def lowest_first() -> bool:
    """Whether of equal scores the expert with the lowest index wins. (Which one wins in torch is
    chance; that all devices agree is what counts.)"""
    random = np.random.default_rng(0)
    x, router = (random.integers(-1, 2, (n, 4)).astype(np.float32) for n in (50, 8))
    want = np.argsort(-(x @ router.T), axis=-1, kind="stable")[:, :3]
    expert, _ = island.route(jnp.asarray(x), jnp.asarray(router), 3, True)
    return bool((np.asarray(expert) == want).all())


def test_highest_of_equals_is_caught(monkeypatch):
    assert lowest_first()
    route = island.route

    def wrong(x, router, *how):
        expert, share = route(x, router[::-1], *how)
        return len(router) - 1 - expert, share

    monkeypatch.setattr(island, "route", wrong)
    assert not lowest_first()
