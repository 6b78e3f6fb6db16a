"""Every weight of a model from its facts alone: what `tpjax.weights` gets by tracing the model, in
microseconds and without jax. `tests/test_inventory.py` holds the two equal.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tpjax.config import ModelConfig, itemsize
from tpjax.parallel.dims import Dim, head_dim
from tpjax.parallel.layout import Layout


@dataclass(frozen=True)
class Weight:
    """One weight and how it is cut. ``parts``: into how many pieces, dimension by dimension.
    ``itemsize`` is the dtype's, unless 8-bit weights are planned with."""

    path: str
    dims: tuple[Dim, ...]
    parts: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]  # the mesh axes of every dimension
    dtype: str
    itemsize: int

    @property
    def bytes(self) -> int:
        """Of all devices of one replica together, each byte once; padding included."""
        return math.prod(dim.size for dim in self.dims) * self.itemsize

    @property
    def stored(self) -> int:
        """Elements a checkpoint holds."""
        return math.prod(dim.stored for dim in self.dims)

    @property
    def bytes_per_device(self) -> int:
        return self.bytes // math.prod(self.parts)

    @property
    def sharding(self) -> str:
        """``tensor x rep, -``: which mesh axes split each dimension; ``-`` is none."""
        return ", ".join(" x ".join(names) or "-" for names in self.axes)


def weights(config: ModelConfig, layout: Layout, itemsize_of_matrix: int | None = None):
    """All weights of a model on this layout. ``itemsize_of_matrix``: bytes of an element of what is
    multiplied, if it is not the model's dtype."""
    for path, dims in _declared(config, layout):
        here = layout.at(path)
        axes = tuple(here.mesh_axes(dim.axis) for dim in dims)
        parts = tuple(math.prod(here.shape[a] for a in names) for names in axes)
        dtype = config.held if len(dims) > 1 else config.dtype
        matrix = len(dims) > 1 and path not in ("embed.w", "positions")
        size = itemsize_of_matrix if matrix and itemsize_of_matrix else itemsize(dtype)
        yield Weight(path, dims, parts, axes, dtype, size)


def _declared(config: ModelConfig, layout: Layout) -> Iterator[tuple[str, tuple[Dim, ...]]]:
    """What `tpjax.nn.decoder` declares."""
    c = config
    D, width = layout.dim("embed", c.embed), layout.dim("embed", c.embed_in or c.embed)

    def linear(path: str, out: Dim, in_: Dim, bias: bool = False):
        yield f"{path}.w", (out, in_)
        if bias:
            yield f"{path}.b", (out,)

    def norm(path: str, size: int = c.embed):
        for leaf in ("w", "b") if c.norm == "layer" else ("w",):
            yield f"{path}.{leaf}", (Dim(None, size, size),)

    def mlp(path: str, width: int):
        F = layout.at(path).dim("mlp", width)
        if c.gated:
            yield from linear(f"{path}.gate", F, D, c.mlp_bias)
        yield from linear(f"{path}.up", F, D, c.mlp_bias)
        yield from linear(f"{path}.down", D, F, c.mlp_bias)

    def mixture(path: str):
        moe, here = c.moe, layout.at(path)
        assert moe is not None
        E, F = here.dim("experts", moe.experts), here.dim("expert_mlp", moe.mlp)
        yield f"{path}.router", (Dim(None, moe.experts, moe.experts), D)
        yield f"{path}.gate", (E, F, D)
        yield f"{path}.up", (E, F, D)
        yield f"{path}.down", (E, D, F)
        if moe.shared_mlp:
            yield from mlp(f"{path}.shared", moe.shared_mlp)
            yield from linear(f"{path}.shared_gate", Dim(None, 1, 1), D)

    def attention(path: str):
        heads = layout.at(path).heads(c)
        N = head_dim("heads", heads.queries, c.heads, c.head_dim)
        K = head_dim("kv_heads", heads.kv, c.kv_heads, c.head_dim)
        for name, out in (("q", N), ("k", K), ("v", K)):
            yield from linear(f"{path}.{name}", out, D, c.qkv_bias)
        yield from linear(f"{path}.o", D, N, c.o_bias)
        if c.qk_norm:
            yield from norm(f"{path}.q_norm", c.head_dim)
            yield from norm(f"{path}.k_norm", c.head_dim)

    yield "embed.w", (layout.at("embed").dim("vocab", c.vocab), width)
    if c.learned_positions:
        yield "positions", (Dim(None, c.learned_positions, c.learned_positions), D)
    if c.embed_in:
        yield from linear("project_in", D, width)
        yield from linear("project_out", width, D)
    around = ("post_attn_norm", "post_mlp_norm") if c.norm_place == "around" else ()
    for n in range(c.layers):
        for name in ("attn_norm", "mlp_norm", *around):
            yield from norm(f"blocks.{n}.{name}")
        yield from attention(f"blocks.{n}.attn")
        if c.is_sparse(n):
            yield from mixture(f"blocks.{n}.moe")
        else:
            yield from mlp(f"blocks.{n}.mlp", c.mlp)
    if c.final_norm:
        yield from norm("norm")
    if not c.tie_embeddings:
        yield "head", (layout.at("head").dim("vocab", c.vocab), width)
