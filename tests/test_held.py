"""Matrices of a bfloat16 checkpoint on a CPU: held in 16 bits, computed with in float32."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from tests import reference
from tpjax import native


@pytest.mark.parametrize("ready", [True, False])
def test_float32_of_a_bfloat16_checkpoint(tiny_model, monkeypatch, ready):
    """As exact as transformers in float32, in half the bytes; with our kernel and without."""
    if not ready:
        monkeypatch.setattr(native, "ready", lambda: False)
    folder, hf = tiny_model(dtype=torch.bfloat16)
    llm = reference.load(folder, 2, dtype="float32", max_model_len=64)
    held = {spec.path: spec.dtype for spec in llm.table.specs}
    for path, leaf in zip(held, llm.weights, strict=True):
        assert leaf.dtype == held[path] == (jnp.bfloat16 if leaf.ndim > 1 else jnp.float32)
    ids = reference.prompt(20)
    wanted = reference.logits(hf, ids)
    error = np.abs(llm.logits(ids) - wanted).max() / np.abs(wanted).max()
    assert error <= reference.TOLERANCE


def test_one_wider_matrix_and_none_is_narrowed(tiny_model, tmp_path):
    folder, _ = tiny_model(dtype=torch.bfloat16)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    llm = reference.load(tmp_path, 1, dtype="float32", max_model_len=64)
    assert {leaf.dtype for leaf in llm.weights} == {jnp.dtype("float32")}
