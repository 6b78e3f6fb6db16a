"""Token embedding, its table split over the vocabulary. V vocabulary (padded), D its width."""

import jax
from flax import nnx

from tpjax.nn.param import value, weight
from tpjax.ops.embed import lookup
from tpjax.plan import Plan


class Embed(nnx.Module):
    """Rows of a table; ``vocab`` is rounded up so that every device holds equally many."""

    def __init__(self, vocab: int, width: int, *, plan: Plan, dtype: str):
        self.plan = plan
        self.w = weight((plan.dim("vocab", vocab), plan.dim("embed", width)), dtype)

    def __call__(self, token_BT: jax.Array) -> jax.Array:
        return lookup(self.plan, value(self.w), token_BT)
