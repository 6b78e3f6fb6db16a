"""Steps compiled for eight TPUs on a machine without one. Needs the extra ``tpu``, whose compiler
is too large to ask of everybody who runs the tests."""

import importlib.util

import pytest

from tests.audited import audited
from tests.published import published
from tests.test_audit import MISTAKES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='pip install "tpjax[tpu]"'
)
DENSE = ("llama-3.2-3b", "qwen3-8b", "gemma-2-9b-it", "phi-3-mini-4k", "opt-125m")
MIXTURES = ("mixtral-8x7b-v0.1", "qwen3-30b-a3b")
# Of those an audit for GPUs finds, what has nothing to do with a GPU's compiler.
SEEDED = ("MLP whole", "summed twice", "no donation")


def for_tpus(name: str, step: str):
    return audited(published(name, 2), step, "v5e:8", greedy=True, context=2048)


def _cases():
    for n, name in enumerate((*DENSE, *MIXTURES)):
        steps = ("decode[b1]", "prefill[t512]") if name in DENSE else ("prefill[t512]",)
        for step in steps:
            usual = n < 3 if step.startswith("decode") else n == 0
            yield pytest.param(name, step, marks=() if usual else pytest.mark.extra)


@pytest.mark.parametrize("name, step", list(_cases()))
def test_compiled_for_tpus(greedy, name, step):
    """As the plan states: every byte of the arguments, every collective, the cache in place."""
    audit = for_tpus(name, step)
    assert audit.findings() == []
    assert len(audit.sums()) == 2 * 2 + 1


@pytest.mark.parametrize("name", MIXTURES[:1])
def test_a_mixture_decoded_on_tpus_copies_experts(greedy, name):
    """A limit, told by the audit: that compiler does not multiply with a slice where it lies."""
    (*others, copied) = for_tpus(name, "decode[b1]").findings()
    assert {finding.rule for finding in others} <= {"memory"} and "it was copied" in str(copied)


@pytest.mark.parametrize("name", SEEDED)
def test_a_mistake_is_found_for_tpus_too(greedy, monkeypatch, name):
    words, said = MISTAKES[name]
    words = {"context": 2048} | words
    words.pop("patch", lambda monkeypatch: None)(monkeypatch)
    found = audited(published("llama-3.1-8b-instruct", 2), "decode[b1]", "v5e:8", **words)
    assert any(said in str(finding) for finding in found.findings())
