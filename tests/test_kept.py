"""What one start keeps and the next one uses: the same tokens, nothing imported, traced or compiled
for them; and nothing of it where anything it depends on has changed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tokenizers import Tokenizer as Backend

import tpjax
from tpjax import env, kept
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint.folder import bundled, model_config, read_folder
from tpjax.checkpoint.safetensors import read_json
from tpjax.checkpoint.tokenizer import KeptTokenizer, load_tokenizer
from tpjax.errors import CheckpointError
from tpjax.executables import compiles
from tpjax.params import SamplingParams

START = """
    import json, sys
    from tpjax import env
    env.start(2)
    import tpjax
    from tpjax.executables import compiles
    llm = tpjax.LLM({model!r}, 2, dtype={dtype!r}, max_model_len=64, expect="ROMEO:", say=print)
    params = tpjax.SamplingParams(temperature=0.0, max_tokens=12)
    made = llm.generate("ROMEO:", params)[0].outputs[0]
    modules = [name for name in ("flax", "transformers") if name in sys.modules]
    print(json.dumps(dict(ids=made.token_ids, compiles=compiles.count, modules=modules)))
"""


def start(cache: Path, dtype: str = "float32", **more: str) -> dict:
    """What a process of its own says of its start."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TPJAX_KEPT", "XLA_FLAGS")}
    code = textwrap.dedent(START).format(model=str(bundled()), dtype=dtype)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=clean | {"XDG_CACHE_HOME": str(cache)} | more,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first(cache):
    return start(cache)


def test_the_second_start_imports_and_compiles_nothing_for_the_model(cache, first):
    second = start(cache)
    assert second["ids"] == first["ids"] and len(first["ids"]) == 12
    assert first["modules"] == ["flax", "transformers"] and first["compiles"] >= 3
    assert second["modules"] == [] and second["compiles"] == 0


def test_what_is_damaged_is_made_anew(cache, first):
    files = sorted((cache / "tpjax" / "kept").iterdir())
    assert {file.name.partition("-")[0] for file in files} == {"config", "step", "tokenizer"}
    for n, file in enumerate(files):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if n % 2 else content[: len(content) // 2])
    again = start(cache)
    assert again["ids"] == first["ids"] and again["compiles"] == first["compiles"]
    assert start(cache)["compiles"] == 0


@pytest.mark.parametrize(
    "changed",
    [
        dict(dtype="bfloat16"),
        dict(TPJAX_NATIVE="0"),
        dict(JAX_ENABLE_CHECKS="1"),
        dict(XLA_FLAGS="--xla_cpu_enable_fast_min_max=true"),
        dict(TPJAX_KEPT="0"),
        dict(JAX_ENABLE_COMPILATION_CACHE="0"),
    ],
    ids=str,
)
def test_what_an_executable_depends_on(cache, first, changed):
    assert start(cache, **changed)["compiles"] >= first["compiles"]


@pytest.fixture
def keeping(monkeypatch, tmp_path):
    """In this process, and in a folder of its own; whatever other tests have turned off."""
    monkeypatch.setenv("TPJAX_KEPT", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    yield tmp_path / "cache" / "tpjax" / "kept"
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def test_our_source_is_part_of_every_name(keeping, monkeypatch):
    kept.write(keeping, "config", "about", b"x")
    assert kept.read(keeping, "config", "about") == b"x"
    assert kept.read(keeping, "config", "else") is None
    monkeypatch.setattr(kept, "source", lambda: "changed")
    assert kept.read(keeping, "config", "about") is None


def test_where_nothing_can_be_kept(tmp_path):
    (tmp_path / "file").write_text("")
    kept.write(tmp_path / "file" / "folder", "config", 1, b"x")
    assert kept.read(tmp_path / "file" / "folder", "config", 1) is None
    kept.write(None, "config", 1, b"x")
    assert kept.read(None, "config", 1) is None


def test_on_accelerators_only_who_asks_for_it(keeping, monkeypatch):
    assert env.kept_executables_dir("cpu") is not None
    assert env.kept_executables_dir("gpu") is not None  # TPJAX_KEPT=1
    monkeypatch.delenv("TPJAX_KEPT")
    assert env.kept_executables_dir("gpu") is None and env.kept_executables_dir("cpu") is not None


def test_what_comes_from_jax_s_own_cache_is_not_kept(keeping, monkeypatch, tmp_path, quiet):
    """On a CPU such an executable is written without its functions: the next start would fail."""
    folder = tmp_path / "jax" / "tpjax"
    monkeypatch.setattr(env, "kept_executables_dir", lambda platform: folder)

    def built() -> tpjax.LLM:
        llm = tpjax.LLM(bundled(), 2, max_model_len=40, max_num_seqs=1, **quiet)
        llm.generate("ROMEO:", SamplingParams(temperature=0.0, max_tokens=2))
        return llm

    jax.clear_caches()
    built()
    for file in folder.glob("step-*"):
        file.unlink()
    hits = compiles.cache_hits
    again = built()
    assert compiles.cache_hits > hits  # of jax's cache
    assert all(b.from_cache for b in again.executables.built.values())
    assert not list(folder.glob("step-*"))


def test_a_config_is_the_same_with_and_without_transformers(keeping, monkeypatch):
    raw = read_json(bundled() / "config.json")
    made = model_config(raw, "here")
    monkeypatch.setattr(folders, "_resolved", None)  # not asked again
    assert model_config(raw, "here") == made
    with pytest.raises(TypeError):
        model_config(raw | {"hidden_size": 512}, "here")


def test_who_registers_a_family_may_change_it_at_any_time(keeping, monkeypatch):
    """Nothing is kept of a family that is not ours."""
    raw = read_json(bundled() / "config.json")
    monkeypatch.setattr(folders.find("llama", "").config, "__module__", "theirs")
    model_config(raw, "here")
    assert not keeping.exists()


def test_a_kept_tokenizer_is_transformers_one(keeping, tmp_path):
    folder = read_folder(bundled())
    whole, short = load_tokenizer(folder), load_tokenizer(folder)
    assert not isinstance(whole, KeptTokenizer) and isinstance(short, KeptTokenizer)
    for text in ("ROMEO:\nBut soft", " two  spaces", "ünïcödé 🙂", "<|endoftext|> a"):
        assert short.encode(text) == whole.encode(text)
    assert "whole" not in vars(short)  # until now
    text = "ROMEO: thou"
    asked = dict(add_special_tokens=False)
    assert short.encode(text, **asked) == whole.encode(text, **asked)
    assert short(text)["input_ids"] == whole(text)["input_ids"] and len(short) == len(whole)
    assert short.decode([5, 6, 7]) == whole.decode([5, 6, 7])
    assert short.chat_template == whole.chat_template and short.eos_token == whole.eos_token
    with pytest.raises(AttributeError):
        short.no_such_thing  # noqa: B018


def test_a_file_that_truncates_truncates_nothing(keeping, folder):
    """transformers heeds that only where it is asked to."""
    made = Backend.from_file(str(bundled() / "tokenizer.json"))
    made.enable_truncation(max_length=3)
    made.save(str(folder / "tokenizer.json"))
    about = read_json(bundled() / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    model = read_folder(folder)
    model = folders.replace(model, config=folders.replace(model.config, vocab=1 << 20))
    whole, short = load_tokenizer(model), load_tokenizer(model)
    assert isinstance(short, KeptTokenizer)
    assert short.encode("one two three four five") == whole.encode("one two three four five")
    assert len(short.encode("one two three four five")) > 3


def test_ids_beyond_the_embedding_are_refused_again(keeping):
    folder = read_folder(bundled())
    load_tokenizer(folder)
    small = folders.replace(folder, config=folders.replace(folder.config, vocab=100))
    with pytest.raises(CheckpointError, match="they do not belong together"):
        load_tokenizer(small)
