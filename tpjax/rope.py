"""Rotary position embedding as facts: which angles a position gets. No jax.

Every formula is the one its authors published with the checkpoints that use it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """``angle = position * inv_freq``, half-split; cosine and sine are multiplied by ``scale``.

    - ``linear`` divides every frequency by ``factor``.
    - ``llama3`` keeps short wavelengths, divides long ones by ``factor`` and blends between.
    - ``yarn`` does so by the number of rotations within ``original_max_position``.
    - ``dynamic`` raises ``theta`` as the sequence outgrows ``original_max_position``.
    - ``longrope`` divides each frequency by its own factor, of one list for sequences up to
      ``original_max_position``, of another for longer ones.

    The last two depend on the sequence's length: `grows`.
    """

    theta: float = 10000.0
    kind: Kind = "default"
    rotated: float = 1.0  # part of every head that is rotated
    factor: float = 1.0
    scale: float = 1.0
    original_max_position: int = 8192
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()

    @property
    def grows(self) -> bool:
        """Whether frequencies depend on how long the sequence is."""
        return self.kind in ("dynamic", "longrope")

    @property
    def recomputed_at(self) -> int | None:
        """The length beyond which all positions so far are rotated anew, None if there is none."""
        return self.original_max_position if self.kind == "longrope" else None

    def dim(self, head_dim: int) -> int:
        """How many elements of a head are rotated."""
        return int(head_dim * self.rotated)

    def inv_freq(self, head_dim: int, *, long: bool = False) -> np.ndarray:
        """Float32 ``[dim / 2]``, in radians per position; of a dynamic rope as it is before it
        grows. ``long``: of longrope, the factors of long sequences."""
        dim = self.dim(head_dim)
        wave = np.float32(self.theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
        inv = (1.0 / wave).astype(np.float32)
        match self.kind:
            case "default" | "dynamic":
                return inv
            case "linear":
                return (inv / np.float32(self.factor)).astype(np.float32)
            case "llama3":
                return self._llama3(inv)
            case "yarn":
                return self._yarn(inv, dim)
            case "longrope":
                factors = np.asarray(self.long_factor if long else self.short_factor, np.float32)
                return (1.0 / (factors * wave)).astype(np.float32)

    def _llama3(self, inv: np.ndarray) -> np.ndarray:
        wavelength = 2 * math.pi / inv
        low, high = self.low_freq_factor, self.high_freq_factor
        smooth = (self.original_max_position / wavelength - low) / (high - low)
        smooth = np.clip(smooth, 0.0, 1.0)
        return ((1 - smooth) * inv / self.factor + smooth * inv).astype(np.float32)

    def _yarn(self, inv: np.ndarray, dim: int) -> np.ndarray:
        def dimension(rotations: float) -> float:
            """The dimension that turns that often within the original length."""
            turns = self.original_max_position / (rotations * 2 * math.pi)
            return dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        span = high - low if high != low else 0.001
        ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / span, 0, 1)
        return (inv / self.factor * ramp + inv * (1 - ramp)).astype(np.float32)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cosine and sine by: ``0.1 mscale ln(factor) + 1``."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def longrope_scale(factor: float, original_max_position: int) -> float:
    """What LongRoPE multiplies them by: ``sqrt(1 + ln(factor) / ln(original))``."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_max_position))
