"""What is true of an architecture, in lower-case words that are also the logical axis names.

No jax here: a config can be read, compared and planned with before any device is touched.
"""

from dataclasses import dataclass
from typing import Literal

from tpjax.errors import UsageError
from tpjax.rope import Rope


@dataclass(frozen=True, kw_only=True)
class MoE:
    """A mixture of experts: every token goes to ``per_token`` of ``experts`` gated MLPs."""

    experts: int
    per_token: int
    mlp: int  # width of one expert
    renormalise: bool = True  # shares of the chosen experts sum to one
    shared_mlp: int = 0  # width of the expert every token goes to, behind a gate of its own
    layers: tuple[bool, ...] = ()  # which layers have experts

    def pair_by_pair(self, rows: int, experts: int) -> bool:
        """Whether an accelerator that has this many of the experts multiplies every row with its
        own experts, or rows of one expert together (see `tpjax.ops.experts`)."""
        return rows == 1 or rows * self.per_token <= experts


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The facts of one decoder. Hashable: it is part of what an executable is compiled for."""

    family: str
    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    max_position: int = 2048
    dtype: str = "float32"
    matrix_dtype: str | None = None  # what matrices are held in, where that is not dtype

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # Gemma multiplies by 1 + weight, in float32
    norm_place: Literal["before", "around", "after"] = "before"  # where blocks are normalised
    final_norm: bool = True
    qk_norm: bool = False  # queries and keys, head by head
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    act: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    moe: MoE | None = None

    tie_embeddings: bool = False
    embed_scale: float = 1.0
    embed_in: int = 0  # width of the embedding table, if it is not embed
    learned_positions: int = 0  # rows of a table of positions, if there is one
    position_offset: int = 0  # its row for position 0

    rope: Rope | None = Rope()
    rope_local: Rope | None = None  # of local layers, if it is another one
    window: int | None = None  # positions a local layer sees, its own included
    local_layers: tuple[bool, ...] = ()
    attn_scale: float | None = None  # of the scores; by default head_dim ** -0.5
    attn_softcap: float | None = None
    final_softcap: float | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values one token keeps in the cache, all layers, without padding."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize(self.dtype)

    @property
    def held(self) -> str:
        """The dtype of every weight of two dimensions or more."""
        return self.matrix_dtype or self.dtype

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees no further back than `window`."""
        return bool(self.local_layers) and self.local_layers[layer]

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.moe is not None and self.moe.layers[layer]


def itemsize(dtype: str) -> int:
    """Bytes of one element; bfloat16 is known without importing its package."""
    return {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]


DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(asked: object) -> None:
    """Raise UsageError for what is neither ``auto`` nor a dtype models can have here."""
    if not isinstance(asked, str) or asked not in ("auto", *DTYPES):
        raise UsageError(f"dtype={asked!r}: known are auto, {', '.join(DTYPES)}")
