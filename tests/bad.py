"""What the tests of bad input share: how a refusal must look, and checkpoints to damage."""

import json
from contextlib import contextmanager

import pytest
from safetensors.numpy import load_file, save_file

from tpjax.errors import CheckpointError, ResourceError, RunError, TpjaxError, UsageError
from tpjax.executables import compiles

EXIT = {UsageError: 2, CheckpointError: 3, ResourceError: 4, RunError: 5}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@contextmanager
def refused(error, *said):
    """The block raises exactly this error, in one line that holds all of ``said``, and compiles
    nothing for it."""
    before = compiles.count
    with pytest.raises(TpjaxError) as caught:
        yield
    assert compiles.count == before
    line = str(caught.value)
    assert type(caught.value) is error and caught.value.exit_code == EXIT[error], line
    assert len(line.splitlines()) == 1, line
    assert not [word for word in said if str(word) not in line], line


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, **changes):
    """Replace tensors; None removes one. ``model__norm`` stands for ``model.norm``."""
    tensors = load_file(folder / WEIGHTS)
    for name, value in changes.items():
        tensors[name.replace("__", ".")] = value
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)


def key(name):
    return name.replace(".", "__")
