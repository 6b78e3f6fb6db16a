"""What a degree costs that does not divide a model: padding and copies, in bytes and FLOPs."""

import math
from dataclasses import dataclass

from tpjax.weights import WeightTable


@dataclass(frozen=True)
class Padding:
    """Of one replica. Shares are of what the model has without padding: 0.25 is a quarter more."""

    weight_bytes: int  # zeros among the weights
    weights: float
    flops: float  # of the products of one token, attention's own aside
    cache: float  # keys and values of heads that are padding
    copies: int  # devices that hold each key/value head
    copied_bytes: int  # of their projections, beyond the first copy
    sizes: dict[str, tuple[int, int]]  # axis -> (the model's size, the padded one)

    @property
    def costs(self) -> bool:
        """Whether there is something to tell: padding, or copies of key/value heads."""
        return self.uneven or self.copies > 1

    @property
    def uneven(self) -> bool:
        """Whether more is padded than a few rows of the vocabulary."""
        return bool(self.sizes.keys() - {"vocab"})

    def __str__(self) -> str:
        said = []
        if self.sizes:
            changed = ", ".join(f"{axis} {a} -> {b}" for axis, (a, b) in self.sizes.items())
            said.append(
                f"padding: {changed}: {self.weight_bytes / 1e9:.3f} GB of zeros,"
                f" {self.weights:+.1%} weights, {self.flops:+.1%} FLOPs, {self.cache:+.1%} cache"
            )
        if self.copies > 1:
            said.append(
                f"each key/value head is on {self.copies} devices: {self.copies} times the cache"
                f" and its projections, {self.copied_bytes / 1e9:.3f} GB of copied weights"
            )
        return "; ".join(said) or "no padding, no copies"


def padding(table: WeightTable) -> Padding:
    """What the table's plan adds to its model."""
    config, plan = table.config, table.plan
    heads = plan.heads(config)
    copies = plan.shards("heads") // plan.shards("kv_heads")
    zeros = sum(spec.bytes - math.prod(spec.stored) * spec.dtype.itemsize for spec in table.specs)
    whole = sum(math.prod(spec.stored) * spec.dtype.itemsize for spec in table.specs)
    sizes = {
        "heads": (config.heads, len(heads.queries)),
        "kv_heads": (config.kv_heads, len(heads.kv)),
    }
    for spec in table.specs:
        for dim in spec.dims:
            if dim.axis not in (None, "heads", "kv_heads") and dim.size != dim.stored:
                sizes[dim.axis] = (dim.stored, dim.size)
    return Padding(
        weight_bytes=zeros,
        weights=zeros / whole,
        flops=_products(table, laid_out=True) / _products(table, laid_out=False) - 1,
        cache=len(heads.kv) / config.kv_heads - 1,
        copies=copies,
        copied_bytes=(copies - 1) * sum(s.bytes for s in table.specs if "kv_heads" in s.axes),
        sizes={axis: of for axis, of in sizes.items() if of[0] != of[1]},
    )


def _products(table: WeightTable, laid_out: bool) -> int:
    """Elements of weights that one token is multiplied with; of experts, the chosen ones."""
    moe, total = table.config.moe, 0
    for spec in table.specs:
        if len(spec.dims) < 2 or spec.path == "positions":
            continue
        if spec.path == "embed.w" and not table.config.tie_embeddings:
            continue  # looked up, not multiplied
        dims, times = spec.dims, 1
        if moe is not None and dims[0].axis == "experts":
            dims, times = dims[1:], moe.per_token
        total += times * math.prod(dim.size if laid_out else dim.stored for dim in dims)
    return total
