"""The measure: transformers on the CPU, and what it means to agree with it."""

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
    fresh(hf)
    return hf(torch.tensor([ids])).logits[0].float().numpy()


@torch.no_grad()
def fresh(hf) -> None:
    """Forget earlier prompts: a dynamic rope keeps the longest until it sees a short one."""
    hf(torch.tensor([[0]]))


@torch.no_grad()
def states(hf, ids) -> list[np.ndarray]:
    """``[T, D]`` after the embedding, after every layer, and after the final norm, if there is one.

    Read by hooks: transformers' own ``hidden_states`` have the last layer's output only behind the
    norm.
    """
    decoder = hf.model.decoder if hasattr(hf.model, "decoder") else hf.model
    seen: list[torch.Tensor] = []
    hooks = [decoder.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))]
    for layer in decoder.layers:
        keep = lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        hooks.append(layer.register_forward_hook(keep))
    norm = getattr(decoder, "norm", None) or getattr(decoder, "final_layer_norm", None)
    if norm is not None:
        hooks.append(norm.register_forward_hook(lambda module, args, out: seen.append(out)))
    fresh(hf)
    seen.clear()
    hf(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    if norm is None:
        seen.append(seen[-1])
    return [x.reshape(-1, x.shape[-1]).float().numpy() for x in seen]


@torch.no_grad()
def decoded(hf, ids, prompt: int) -> np.ndarray:
    """Logits ``[T - prompt, V]`` of the tokens after a prompt, fed one by one through its cache."""
    fresh(hf)
    out = hf(torch.tensor([ids[:prompt]]), use_cache=True)
    logits = []
    for id_ in ids[prompt:]:
        out = hf(torch.tensor([[id_]]), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, 0].float())
    return torch.stack(logits).numpy()


def prompt_and_greedy(hf, length: int, count: int) -> tuple[tuple[int, ...], list[int]]:
    """A prompt of about this length, and what transformers appends to it; the first at which no
    choice is near a tie."""
    for seed in range(20):
        ids = tuple(np.random.default_rng(seed).integers(0, hf.config.vocab_size, length).tolist())
        try:
            return ids, greedy(hf, ids, count)
        except AssertionError:
            continue
    raise AssertionError("every prompt leads to a near tie: use another model")


@functools.cache
def greedy(hf, ids: tuple[int, ...], count: int) -> list[int]:
    """The tokens that transformers' own generate appends. None may be so near a tie that rounding
    could decide it: then the prompt is no test, and another one is needed."""
    fresh(hf)
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
