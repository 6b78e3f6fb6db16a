"""Token embedding, its table split over the vocabulary. V vocabulary (padded), D its width."""

import jax
from flax import nnx

from tpjax.config import ModelConfig
from tpjax.nn.param import value, weight
from tpjax.ops.embed import lookup
from tpjax.plan import Plan


class Embed(nnx.Module):
    """Rows of a table; ``vocab`` is rounded up so that every device holds equally many."""

    def __init__(self, width: int, *, plan: Plan, config: ModelConfig):
        self.plan, self.dtype = plan, config.dtype
        rows = plan.dim("vocab", config.vocab)
        self.w = weight((rows, plan.dim("embed", width)), config.held)

    def __call__(self, token_BT: jax.Array) -> jax.Array:
        return lookup(self.plan, value(self.w), token_BT).astype(self.dtype)
