"""Eight forced CPU devices and strict jax, for every test; small models shared by the session."""

import os
import shutil
import tempfile

os.environ["TPJAX_KEPT"] = "0"  # tests change the code; what is kept knows only the files

import jax
import jax.numpy as jnp
import pytest

_cache = tempfile.TemporaryDirectory(prefix="tpjax-test-cache-")
jax.config.update("jax_compilation_cache_dir", _cache.name)  # never the user's own
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from tpjax import env, native  # noqa: E402
from tpjax.ops import sample  # noqa: E402

env.start()

from tests import tiny, wrong  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--every-case", action="store_true", help="run tests marked extra too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--every-case"):
        return
    extra = [item for item in items if item.get_closest_marker("extra")]
    items[:] = [item for item in items if not item.get_closest_marker("extra")]
    config.hook.pytest_deselected(items=extra)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """`tiny_model(**facts)` -> (folder, transformers model in float32); made once per session."""
    made = {}

    def get(**facts):
        key = tuple(sorted((k, str(v)) for k, v in facts.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny")
            made[key] = (folder, tiny.make(folder, **facts))
        return made[key]

    return get


@pytest.fixture(scope="session")
def apart(tmp_path_factory):
    """`apart(mutation)`: how far tpjax is from transformers where that would show."""
    return wrong.Comparison(tmp_path_factory.mktemp)


@pytest.fixture
def xla_attention(monkeypatch):
    """Attention as accelerators run it: without our own kernel for CPUs."""
    monkeypatch.setattr(native, "attends", lambda dtype: False)


@pytest.fixture
def quiet():
    """Keyword arguments that keep an LLM from printing."""
    return {"say": lambda line: None}


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A whole, loadable checkpoint of one layer, for a test to damage."""
    made, _ = tiny_model(num_hidden_layers=1)
    return shutil.copytree(made, tmp_path / "model")


@pytest.fixture
def greedy(monkeypatch):
    """A sampler for greedy requests only. It knows no families, and is most of what is compiled;
    the whole of it is in test_hlo.py and in `tpjax audit`."""
    monkeypatch.setattr(sample, "_any", lambda flag_B, axes: jnp.bool_(False))
