"""The island of a mixture of experts: every device does what its experts, or its slices of them,
have to do, for all tokens of its replica. No collectives: the caller sums.

R rows (tokens), E experts here, X experts per token, P = R X pairs, F expert width here, D embed,
M rows of one block, I and O input and output features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpjax.config import MoE
from tpjax.ops import tiles
from tpjax.ops.matmul import product_on_cpu
from tpjax.plan import Plan

BLOCK = 128  # most rows of one expert that are multiplied together


class Experts(NamedTuple):
    """The weights of one layer's experts: arrays, or the specs of these."""

    router_ED: Any
    gate_EFD: Any
    up_EFD: Any
    down_EDF: Any


def mixture(
    plan: Plan,
    x_RD: jax.Array,
    weights: Experts,
    moe: MoE,
    act: Callable[[jax.Array], jax.Array],
    partial: tuple[str, ...],
) -> jax.Array:
    """``y_RD`` in float32, not yet summed over the mesh axes ``partial``.

    Every device routes all rows itself, in float32 and from the same numbers, so all agree; of
    equal scores the expert with the lowest index wins.
    """
    split = plan.mesh_axes("experts")
    on_cpu = plan.platform == "cpu"

    def one_of(x_MI: jax.Array, w_EOI: jax.Array, expert: jax.Array) -> jax.Array:
        """``x @ w[expert].T``. A slice whose place is only known at run time XLA copies before a
        matrix product; on a CPU our own kernel does not, or it is taken in tiles that stay in the
        cache."""
        if not on_cpu:
            return tiles.product(x_MI, w_EOI, expert, on_cpu=False)
        _, O, I = w_EOI.shape  # noqa: E741
        best = product_on_cpu(plan, x_MI.shape[0], x_MI.dtype, w_EOI.dtype, O * I)
        return (best or tiles.product)(x_MI, w_EOI, expert)

    def local(x_RD, weights):
        expert_RX, share_RX = route(x_RD, weights.router_ED, moe.per_token, moe.renormalise)
        E = weights.gate_EFD.shape[0]
        first = jax.lax.axis_index(split) * E if split else 0
        expert_RX = expert_RX - first
        mine_RX = (expert_RX >= 0) & (expert_RX < E)
        # Few pairs: each reads its expert, in one fused kernel per product. Many: rows of one
        # expert are multiplied together. A CPU has no such kernels and always does the latter.
        R = x_RD.shape[0]
        few = not on_cpu and moe.pair_by_pair(R, E)
        run = _pairs if few else _Blocks(one_of)
        return run(x_RD, weights, expert_RX, mine_RX, share_RX, act)

    return jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(
            plan.spec("batch", None),
            Experts(
                plan.spec(None, "embed"),
                plan.spec("experts", "expert_mlp", "embed"),
                plan.spec("experts", "expert_mlp", "embed"),
                plan.spec("experts", "embed", "expert_mlp"),
            ),
        ),
        out_specs=plan.spec("batch", None, partial=partial),
        check_vma=False,
    )(x_RD, weights)


def route(
    x_RD: jax.Array, router_ED: jax.Array, per_token: int, renormalise: bool
) -> tuple[jax.Array, jax.Array]:
    """Each row's experts, best first, and their shares in float32: a softmax over all experts."""
    score_RE = tiles.dot(x_RD.astype(jnp.float32), router_ED.astype(jnp.float32))
    share_RX, expert_RX = jax.lax.top_k(jax.nn.softmax(score_RE, axis=-1), per_token)
    if renormalise:
        share_RX = share_RX / jnp.sum(share_RX, axis=-1, keepdims=True)
    return expert_RX, share_RX


def _pairs(x_RD, weights: Experts, expert_RX, mine_RX, share_RX, act) -> jax.Array:
    """Every pair by itself, as products and sums of elements: reading the chosen expert is then a
    part of the kernel, where a matrix product would have it copied first."""
    R, X = expert_RX.shape
    # What is elsewhere reads an expert that is read anyway, and counts nothing.
    some = jnp.maximum(jnp.max(jnp.where(mine_RX, expert_RX, -1)), 0)
    expert_P = jnp.where(mine_RX, expert_RX, some).reshape(R * X)

    def product(x_PI: jax.Array, w_EOI: jax.Array) -> jax.Array:
        w_POI = w_EOI[expert_P].astype(jnp.float32)
        return jnp.sum(x_PI.astype(jnp.float32)[:, None, :] * w_POI, axis=-1)

    x_PD = jnp.repeat(x_RD, X, axis=0)
    gate_PF = act(product(x_PD, weights.gate_EFD).astype(x_RD.dtype))
    h_PF = gate_PF * product(x_PD, weights.up_EFD).astype(x_RD.dtype)
    y_PD = product(h_PF, weights.down_EDF)
    share_P = jnp.where(mine_RX, share_RX, 0.0).reshape(R * X)
    return jnp.sum((y_PD * share_P[:, None]).reshape(R, X, -1), axis=1)


class _Blocks:
    """Rows sorted by expert, cut into blocks of one expert each, one block after another. As many
    blocks run as there are; an expert nobody chose is not read."""

    def __init__(self, product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]):
        self._product = product  # of rows and one of many matrices

    def __call__(self, x_RD, weights: Experts, expert_RX, mine_RX, share_RX, act) -> jax.Array:
        R, X = expert_RX.shape
        E = weights.gate_EFD.shape[0]
        M = self._rows(R, X, weights.router_ED.shape[0])
        expert_P = jnp.where(mine_RX, expert_RX, E).reshape(R * X)
        pair_P = jnp.argsort(expert_P, stable=True)
        count_E = jnp.sum(expert_P[:, None] == jnp.arange(E)[None, :], axis=0, dtype=jnp.int32)
        blocks_E = (count_E + M - 1) // M
        last_E, end_E = jnp.cumsum(blocks_E), jnp.cumsum(count_E)

        def block(n, y_RD):
            expert = jnp.sum(last_E <= n, dtype=jnp.int32)
            first = (n - last_E[expert] + blocks_E[expert]) * M
            row_M = first + jnp.arange(M, dtype=jnp.int32)
            real_M = row_M < count_E[expert]
            at_M = jnp.where(real_M, end_E[expert] - count_E[expert] + row_M, 0)
            pair_M = pair_P[at_M]
            x_MD = x_RD[pair_M // X]
            gate_MF = act(self._product(x_MD, weights.gate_EFD, expert).astype(x_RD.dtype))
            h_MF = gate_MF * self._product(x_MD, weights.up_EFD, expert).astype(x_RD.dtype)
            y_MD = self._product(h_MF, weights.down_EDF, expert)
            share_M = jnp.where(real_M, share_RX.reshape(R * X)[pair_M], 0.0)
            return y_RD.at[pair_M // X].add(y_MD * share_M[:, None])

        # Zeros that are the layer's own: XLA makes those of all layers at once, and keeps them.
        nothing_RD = jnp.broadcast_to(0.0 * share_RX[:, :1], x_RD.shape)
        return jax.lax.fori_loop(0, last_E[-1], block, nothing_RD)

    def _rows(self, R: int, X: int, experts: int) -> int:
        """Twice what one of all experts gets on average, as a power of two."""
        usual = 1 << (max(1, 2 * R * X // experts) - 1).bit_length()
        return min(R, usual, BLOCK)
