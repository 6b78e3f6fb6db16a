"""Does the converted model say what the source says, by another implementation? Layer by layer."""

import json
from pathlib import Path

import numpy as np

from checkpoints_tools.plan import open_source
from tpjax.checkpoint.manifest import Manifest
from tpjax.engine.llm import LLM
from tpjax.errors import CheckpointError, UsageError

TOLERANCE = 1e-4  # of the largest absolute value: float32 on both sides, sums in another order
_LONGEST = 512  # tokens of a prompt that are compared


def compare(dst: str | Path, src: str | Path, prompts: str | Path, tensor: int) -> dict:
    """Logits and every layer's output of ``dst`` at ``tensor`` against transformers on ``src``,
    both in float32 on the CPU; differences are in units of the largest absolute value.

    ``prompts``: a file, one prompt per line; where the model has no tokenizer, token ids in JSON.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UsageError('--logits needs torch: pip install "tpjax[convert]"') from error
    lines = _lines(prompts)
    llm = LLM(dst, tensor, dtype="float32", max_num_seqs=1, say=lambda line: None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(open_source(src)[0]), dtype=torch.float32, trust_remote_code=False
    ).eval()
    # What was stated about the checkpoint, a cast, is not a difference.
    stored = {weight.source.name: weight.dtype for weight in Manifest.read(Path(dst)).weights}
    for name, parameter in theirs.named_parameters():
        if name in stored:
            parameter.data = parameter.data.to(getattr(torch, stored[name])).float()
    stages = ["embedding", *(f"layer {n}" for n in range(llm.config.layers)), "norm", "logits"]
    worst = np.zeros(len(stages))
    for line in lines:
        ids = _ids(llm, line)[: min(_LONGEST, llm.max_model_len)]
        ours = [*llm.states(ids), llm.logits(ids)]
        apart = [_distance(a, b) for a, b in zip(ours, _states(theirs, ids), strict=True)]
        worst = np.maximum(worst, apart)
    drift = dict(zip(stages, worst.tolist(), strict=True))
    text = "\n".join(f"  {name:12} {value:.2e}" for name, value in drift.items())
    return {
        "prompts": len(lines),
        "tolerance": TOLERANCE,
        "drift": drift,
        "text": f"largest relative difference to transformers, {len(lines)} prompt(s):\n{text}",
        "problems": [
            f"{dst}: {name} differs from transformers by {value:.2e}, more than {TOLERANCE:g}"
            for name, value in drift.items()
            if not value <= TOLERANCE
        ],
    }


def _states(model, ids: list[int]) -> list[np.ndarray]:
    """As `LLM.states` has them, and the logits. transformers' own list has the last layer's output
    only behind the norm."""
    import torch

    last: list = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: last.extend(args))
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    hook.remove()
    *taps, final = out.hidden_states
    return [x[0].float().numpy() for x in (*taps, *last, final, out.logits)]


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _lines(prompts: str | Path) -> list[str]:
    try:
        lines = [line for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--logits {prompts}: {error}") from error
    if not lines:
        raise UsageError(f"--logits {prompts}: no prompt in it")
    return lines


def _ids(llm: LLM, line: str) -> list[int]:
    if llm.tokenizer is not None:
        return llm.tokenizer.encode(line)
    try:
        ids = json.loads(line)
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise CheckpointError(f"no tokenizer, so prompts must be lists of token ids: {line[:60]!r}")
    return ids
