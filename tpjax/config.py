"""What is true of an architecture, in lower-case words that are also the logical axis names.

No jax here: a config can be read, compared and planned with before any device is touched.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tpjax.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: ``angle = position * inv_freq``, half-split.

    ``linear`` divides every frequency by ``factor``. ``llama3`` keeps short wavelengths, divides
    long ones by ``factor`` and blends between (the rule published with Llama 3.1).
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def inv_freq(self, head_dim: int) -> np.ndarray:
        """Float32 ``[head_dim / 2]``, in radians per position."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        inv = (1.0 / np.float32(self.theta) ** exponent).astype(np.float32)
        match self.kind:
            case "default":
                return inv
            case "linear":
                return (inv / np.float32(self.factor)).astype(np.float32)
            case "llama3":
                wavelength = 2 * math.pi / inv
                low, high = self.low_freq_factor, self.high_freq_factor
                smooth = (self.original_max_position / wavelength - low) / (high - low)
                smooth = np.clip(smooth, 0.0, 1.0)
                return ((1 - smooth) * inv / self.factor + smooth * inv).astype(np.float32)


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
    norm_eps: float = 1e-6
    attn_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    rope: Rope = Rope()
    max_position: int = 2048
    dtype: str = "float32"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values one token keeps in the cache, all layers, all devices."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize(self.dtype)


def itemsize(dtype: str) -> int:
    """Bytes of one element; bfloat16 is known without importing its package."""
    return {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]


DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(asked: object) -> None:
    """Raise UsageError for what is neither ``auto`` nor a dtype models can have here."""
    if not isinstance(asked, str) or asked not in ("auto", *DTYPES):
        raise UsageError(f"dtype={asked!r}: known are auto, {', '.join(DTYPES)}")
