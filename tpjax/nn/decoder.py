"""The decoder: embedding, blocks, final norm, head. Written once, with global shapes.

B sequences, T tokens, D embed, V vocabulary (padded).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tpjax.cache import KVCache
from tpjax.config import ModelConfig
from tpjax.nn.attention import Attention
from tpjax.nn.embed import Embed
from tpjax.nn.linear import Linear, linear
from tpjax.nn.mlp import MLP
from tpjax.nn.moe import MoE
from tpjax.nn.norm import Normed, norm
from tpjax.nn.param import value, weight
from tpjax.nn.rope import CosSin, cos_sin
from tpjax.parallel.dims import Dim
from tpjax.plan import Plan
from tpjax.rope import Rope


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream, which is normalised before each of
    them, around each of them, or after it was added. The stream is float32: what a layer adds is
    rounded by none of those after it."""

    def __init__(self, config: ModelConfig, plan: Plan, layer: int):
        self.place, self.layer = config.norm_place, layer
        self.attn_norm, self.mlp_norm = norm(config), norm(config)
        module = f"blocks.{layer}"
        self.attn = Attention(config, plan.at(f"{module}.attn"), layer)
        if config.is_sparse(layer):
            self.moe = MoE(config, plan.at(f"{module}.moe"))
        else:
            self.mlp = MLP(config, plan.at(f"{module}.mlp"))
        if self.place == "around":
            self.post_attn_norm, self.post_mlp_norm = norm(config), norm(config)

    def __call__(self, x_BTD, rope, cache, position_BT):
        # Scopes are paths of weights: an audit names what a compiled program does by them.
        with jax.named_scope(f"blocks.{self.layer}.attn"):
            normed, onto = self._into(x_BTD, self.attn_norm)
            out_BTD, cache = self.attn(normed, rope, cache, position_BT, onto)
            x_BTD = self._out(x_BTD, out_BTD, self.attn_norm, "post_attn_norm")
        kind = "moe" if hasattr(self, "moe") else "mlp"
        with jax.named_scope(f"blocks.{self.layer}.{kind}"):
            normed, onto = self._into(x_BTD, self.mlp_norm)
            out_BTD = getattr(self, kind)(normed, onto)
            return self._out(x_BTD, out_BTD, self.mlp_norm, "post_mlp_norm"), cache

    def _into(self, x_BTD, norm_):
        """What goes into a part of the block, and what its output is added to there: the stream,
        unless a norm comes before that."""
        normed = Normed(x_BTD, norm_)
        if self.place == "after":
            normed = x_BTD.astype(normed.dtype)
        return normed, None if self.place == "around" else x_BTD

    def _out(self, x_BTD, out_BTD, norm_, post: str):
        """The stream after that part."""
        if self.place == "after":
            return norm_(out_BTD).astype(x_BTD.dtype)
        if self.place == "around":
            return x_BTD + getattr(self, post)(out_BTD).astype(x_BTD.dtype)
        return out_BTD


class Decoder(nnx.Module):
    """A causal language model over a cache. Layers are a Python loop over separate weights: stacked
    weights under a scan are copied before every product, on GPUs as well as on CPUs."""

    def __init__(self, config: ModelConfig, plan: Plan):
        self.config, self.plan = config, plan
        D, width = plan.dim("embed", config.embed), config.embed_in or config.embed
        W = plan.dim("embed", width)
        self.embed = Embed(width, plan=plan.at("embed"), config=config)
        if config.learned_positions:
            rows = Dim(None, config.learned_positions, config.learned_positions)
            self.positions = weight((rows, D), config.held)
        if width != config.embed:
            self.project_in = Linear(D, W, plan=plan, config=config)
            self.project_out = Linear(W, D, plan=plan, config=config)
        self.blocks = nnx.List([Block(config, plan, n) for n in range(config.layers)])
        self.norm = norm(config) if config.final_norm else None
        if not config.tie_embeddings:
            rows = self.head_plan.dim("vocab", config.vocab)
            self.head = weight((rows, W), config.held)

    @property
    def head_plan(self) -> Plan:
        """How logits are split: as the table that makes them."""
        return self.plan.at("embed" if self.config.tie_embeddings else "head")

    def __call__(
        self,
        token_BT: jax.Array,
        position_BT: jax.Array,
        length_B: jax.Array,
        cache: KVCache,
        taps: list[jax.Array] | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """The residual stream ``x_BTD`` after the final norm, and the cache with T more tokens.

        ``length``: how long the sequences are that these tokens belong to, see `cos_sin`.
        ``taps``, if given, receives the embedding's and every block's output.
        """
        config = self.config
        x_BTD = self.start(token_BT, position_BT)
        angles: dict[Rope | None, CosSin] = {
            rope: cos_sin(rope, config.head_dim, position_BT, length_B, config.dtype)
            for rope in (config.rope, config.rope_local)
            if rope is not None
        }
        layers = []
        for n, (block, layer) in enumerate(zip(self.blocks, cache.layers, strict=True)):
            if taps is not None:
                taps.append(x_BTD)
            local = config.rope_local if config.is_local(n) else None
            x_BTD, layer = block(x_BTD, angles.get(local or config.rope), layer, position_BT)
            layers.append(layer)
        if taps is not None:
            taps.append(x_BTD)
        x_BTD = x_BTD.astype(config.dtype) if self.norm is None else self.norm(x_BTD)
        return x_BTD, KVCache(tuple(layers))

    def start(self, token_BT: jax.Array, position_BT: jax.Array) -> jax.Array:
        """What goes into the first block."""
        config = self.config
        with jax.named_scope("embed"):
            x_BTD = self.embed(token_BT)
        if config.embed_scale != 1.0:  # itself and the product rounded to the dtype, as in training
            kind = jnp.finfo(x_BTD.dtype)
            x_BTD = x_BTD * jnp.asarray(config.embed_scale, x_BTD.dtype)
            x_BTD = jax.lax.reduce_precision(x_BTD, kind.nexp, kind.nmant)
        if config.embed_in:
            x_BTD = self.project_in(x_BTD)
        if config.learned_positions:
            row_BT = position_BT + config.position_offset
            spec = self.plan.spec("batch", None, "embed")
            rows_BTD = value(self.positions).at[row_BT].get(out_sharding=spec)
            x_BTD = x_BTD + rows_BTD.astype(x_BTD.dtype)
        return x_BTD.astype(jnp.float32)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 ``[B, T, V]``, split over the vocabulary; padded entries are meaningless."""
        if self.config.embed_in:
            x_BTD = self.project_out(x_BTD)
        table = self.embed.w if self.config.tie_embeddings else self.head
        with jax.named_scope("head"):
            logits_BTV = linear(self.head_plan, x_BTD, value(table), "vocab", "embed")
        if cap := self.config.final_softcap:
            logits_BTV = jnp.tanh(logits_BTV / cap) * cap
        return logits_BTV
