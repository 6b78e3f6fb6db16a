"""The measure: transformers' Llama on the CPU, and what it means to agree with it."""

import functools
from pathlib import Path

import numpy as np
import torch

import tpjax

TOLERANCE = 1e-4  # of the largest absolute value: float32 on both sides, sums in another order
SEED = 4  # of the prompts: no greedy choice after them is near a tie


def load(folder: Path, tensor: int | None = None, **more) -> tpjax.LLM:
    """An LLM that prints nothing."""
    return tpjax.LLM(folder, tensor, say=lambda line: None, **more)


def prompt(length: int, vocab: int = 131) -> tuple[int, ...]:
    """Random token ids, the same every time."""
    return tuple(np.random.default_rng([SEED, length]).integers(0, vocab, length).tolist())


@torch.no_grad()
def logits(hf, ids) -> np.ndarray:
    """``[T, V]``, as transformers has it."""
    return hf(torch.tensor([ids])).logits[0].numpy()


@torch.no_grad()
def states(hf, ids) -> list[np.ndarray]:
    """``[T, D]`` after the embedding, after every layer, and after the final norm.

    Transformers' ``hidden_states`` have the last layer's output only behind the norm.
    """
    last = []
    hook = hf.model.norm.register_forward_pre_hook(lambda module, args: last.extend(args))
    *taps, final = hf.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    hook.remove()
    return [x[0].numpy() for x in (*taps, *last, final)]


@functools.cache
def greedy(hf, ids: tuple[int, ...], count: int) -> list[int]:
    """The tokens that transformers' own generate appends. None may be so near a tie that rounding
    could decide it: then the prompt is no test, and another one is needed."""
    words = {"output_logits": True, "return_dict_in_generate": True}
    out = hf.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count, **words)
    first, second = torch.stack(out.logits)[:, 0].topk(2).values.T
    assert (first - second).min() > TOLERANCE * first.abs().max()
    return out.sequences[0, len(ids) :].tolist()


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """Largest absolute difference, in units of the largest absolute value."""
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def agrees(llm: tpjax.LLM, hf, ids=None, tolerance: float = TOLERANCE) -> bool:
    """Whether both give the same logits after each of these tokens."""
    ids = ids or prompt(60, llm.config.vocab)
    return distance(llm.logits(ids), logits(hf, ids)) <= tolerance
