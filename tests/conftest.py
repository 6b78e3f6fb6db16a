"""Eight forced CPU devices and strict jax, for every test; small models shared by the session."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from tpjax import env  # noqa: E402

env.start()

from tests import tiny  # noqa: E402


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


@pytest.fixture
def quiet():
    """Keyword arguments that keep an LLM from printing."""
    return {"say": lambda line: None}
