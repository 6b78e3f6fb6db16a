"""tpjax: large language models over a named device mesh, in JAX."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpjax.config import ModelConfig
    from tpjax.engine.llm import LLM
    from tpjax.parallel.mesh import make_mesh
    from tpjax.params import SamplingParams
    from tpjax.plan import Plan

__version__ = "0.1.0"

_HOME = {
    "LLM": "tpjax.engine.llm",
    "SamplingParams": "tpjax.params",
    "Plan": "tpjax.plan",
    "make_mesh": "tpjax.parallel.mesh",
    "ModelConfig": "tpjax.config",
}
__all__ = ["LLM", "ModelConfig", "Plan", "SamplingParams", "__version__", "make_mesh"]


def __getattr__(name: str):
    # Lazy, so that `tpjax --help` answers without importing jax.
    if name not in _HOME:
        raise AttributeError(f"module 'tpjax' has no attribute {name!r}")
    from tpjax import env

    if name == "make_mesh":
        env.start()
    return getattr(importlib.import_module(_HOME[name]), name)
