"""What requests ask of the sampler, as one int32 array: packed here, unpacked on the device."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tpjax.ops.sample import Rows
from tpjax.params import COLUMNS, DEVICE_STOP_IDS, WORDS, Row, SamplingParams

GREEDY_BELOW = 1e-5  # as in vLLM: dividing by less would overflow
_COLUMN = {word: i for i, word in enumerate(WORDS)}


_NOBODY = SamplingParams(temperature=0.0)


def pack(rows: Sequence[Row | None]) -> np.ndarray:
    """Int32 ``[B, COLUMNS]``: everything one dispatch needs to know, in one upload."""
    packed = np.empty((len(rows), COLUMNS), np.int32)
    for out, row in zip(packed, rows, strict=True):
        if row is None:
            out[:] = _asked(_NOBODY, 0, ())
        else:
            out[:] = _asked(row.params, row.seed, row.stop_ids)
            out[:3] = row.token, row.position, row.remaining  # WORDS begin with them
    return packed


@functools.lru_cache(maxsize=4096)
def _asked(params: SamplingParams, seed: int, stop_ids: tuple[int, ...]) -> np.ndarray:
    """A row of what stays the same for all of a request: the rest is zero."""
    out = np.zeros(COLUMNS, np.int32)
    out[len(WORDS) :] = -1
    reals = {
        "temperature": params.temperature if params.temperature >= GREEDY_BELOW else 0.0,
        "top_p": params.top_p,
        "min_p": params.min_p,
    }
    for word, value in reals.items():
        out[_COLUMN[word]] = np.float32(value).view(np.int32)
    out[_COLUMN["logprobs"]] = -1 if params.logprobs is None else params.logprobs
    out[_COLUMN["top_k"]] = min(max(params.top_k, 0), 2**30)
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    out[_COLUMN["seed_high"] : _COLUMN["seed_low"] + 1] = words.view(np.int32)
    stop = stop_ids[:DEVICE_STOP_IDS]
    out[len(WORDS) : len(WORDS) + len(stop)] = stop
    return out


def unpack(packed_BC: jax.Array) -> Rows:
    """The inverse of `pack`, while tracing."""

    def whole(word: str) -> jax.Array:
        return packed_BC[:, _COLUMN[word]]

    def real(word: str) -> jax.Array:
        return jax.lax.bitcast_convert_type(whole(word), jnp.float32)

    seed_B2 = jnp.stack([whole("seed_high"), whole("seed_low")], axis=-1)
    return Rows(
        token_B=whole("token"),
        position_B=whole("position"),
        remaining_B=whole("remaining"),
        seed_B2=jax.lax.bitcast_convert_type(seed_B2, jnp.uint32),
        temperature_B=real("temperature"),
        top_k_B=whole("top_k"),
        top_p_B=real("top_p"),
        min_p_B=real("min_p"),
        logprobs_B=whole("logprobs"),
        stop_BE=packed_BC[:, len(WORDS) :],
    )


def repack(
    packed_BC: jax.Array, token_B: jax.Array, position_B: jax.Array, remaining_B: jax.Array
) -> jax.Array:
    """The same, with these three columns, while tracing."""
    first = jnp.stack([token_B, position_B, remaining_B], axis=-1)
    return jnp.concatenate([first, packed_BC[:, 3:]], axis=-1)
