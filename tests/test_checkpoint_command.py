"""`tpjax-checkpoint` as a user meets it: what it prints, what it promises, what it finds."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from checkpoints_tools.bench import corruption, kills, memory
from checkpoints_tools.cli import main
from checkpoints_tools.convert import convert
from tests.bad import WEIGHTS, edit_json
from tests.test_convert import contents
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint.manifest import Manifest
from tpjax.checkpoint.safetensors import SafetensorsFolder

CONFIGS = Path(__file__).parent / "data/configs"
BIG = CONFIGS / "llama-3.1-405b-instruct.json"
VERBS = ("convert", "inspect", "verify", "export")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled model, converted; to be read only."""
    folder = tmp_path_factory.mktemp("bundled") / "m"
    convert(folders.bundled(), folder)
    return folder


def told(capsys, *words, code=0):
    """What a command prints as an object."""
    assert main([*map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


# --- each verb


def test_there_and_back(tmp_path, capsys):
    hf, m, back = folders.bundled(), tmp_path / "m", tmp_path / "back"
    result = told(capsys, "convert", hf, m, "--tensor", 8)
    assert result["weights"] == result["converted_now"] == 47 and result["checkpoint"] == str(m)
    assert told(capsys, "convert", hf, m, "--resume")["already_complete"]
    result = told(capsys, "verify", m, "--against", hf)
    assert result["problems"] == [] and result["tensor"] == 2
    assert told(capsys, "export", m, back)["tensors"] == 47
    assert contents(back) == contents(hf)


def test_progress_and_results_are_apart(tmp_path, capfd):
    """Bars with bytes on standard error, none with --quiet; the result alone on standard output."""
    hf = folders.bundled()
    assert main(["convert", str(hf), str(tmp_path / "a")]) == 0
    out, err = capfd.readouterr()
    assert "converting" in err and "B/s" in err
    assert out.startswith(f"{tmp_path / 'a'}: 47 weights, 0.01 GB, written, read back and compared")
    assert main(["convert", str(hf), str(tmp_path / "b"), "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert not err and len(out.splitlines()) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"example: tpjax-checkpoint {verb} " in out
    assert "--json" in out and "--quiet" in out


def test_as_a_program(bundled):
    """`python -m checkpoints_tools`, in a process that never imports torch."""
    code = (
        "import sys; sys.argv = ['x', 'inspect', sys.argv[1]]\n"
        "from checkpoints_tools.cli import command\n"
        "assert command() == 0\nassert sys.modules['torch'] is None\n"
    )
    words = [sys.executable, "-c", code, str(bundled)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "a tpjax checkpoint" in done.stdout and "made by tpjax" in done.stdout
    done = subprocess.run([sys.executable, "-m", "checkpoints_tools"], capture_output=True)
    assert done.returncode == 0 and b"convert" in done.stdout


# --- the plan


def test_a_dry_run_is_exact(tmp_path, capsys):
    """What it says of every weight is what the manifest then says, and it writes nothing."""
    hf = folders.bundled()
    plan = told(
        capsys, "convert", hf, tmp_path / "m", "--dry-run", "--tensor", 8, "--dtype", "float16"
    )
    assert not list(tmp_path.iterdir())
    result = told(capsys, "convert", hf, tmp_path / "m", "--tensor", 8, "--dtype", "float16")
    manifest = Manifest.read(tmp_path / "m")
    for row, weight in zip(plan["weights"], manifest.weights, strict=True):
        assert row["source"] == weight.source.name and row["file"] == weight.source.file
        assert (row["path"], tuple(row["shape"])) == (weight.path, weight.shape)
        assert (row["source_dtype"], row["dtype"]) == ("bfloat16", weight.dtype)
        assert tuple(row["axes"]) == weight.axes and row["chunks"] == weight.layout.chunks
    files = sum((tmp_path / "m" / w.file).stat().st_size for w in manifest.weights)
    assert plan["bytes"] == result["bytes"] == files
    assert plan["peak_buffers_bytes"] == result["buffers_bytes"]
    assert plan["mesh"] == manifest.mesh == {"data": 1, "expert": 1, "tensor": 4, "rep": 2}
    rows = {row["path"]: row for row in plan["weights"]}
    assert rows["blocks.0.attn.q.w"]["sharding"] == "tensor x rep, -"
    assert rows["blocks.0.attn.k.w"]["sharding"] == "tensor, -"
    assert rows["blocks.0.mlp.down.w"]["sharding"] == "-, tensor x rep"
    assert rows["norm.w"]["sharding"] == "-"
    assert rows["blocks.0.attn.k.w"]["bytes_per_device"] == 128 * 256 * 2 // 4


def test_a_dry_run_for_people(capsys):
    assert main(["convert", str(folders.bundled()), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "model.embed_tokens.weight" in out and "embed.w" in out and "vocab, embed" in out
    assert "4,213,504 parameters" in out and "GB of weights per device" in out


def test_a_dry_run_tells_what_a_degree_costs(capsys):
    """Padding and copies, in words and in JSON."""
    words = ["convert", str(CONFIGS / "qwen2.5-0.5b.json"), "--dry-run", "--tensor"]
    assert main([*words, "3"]) == 0
    assert "padding: heads 14 -> 21, kv_heads 2 -> 3" in capsys.readouterr().out
    assert main([*words, "8"]) == 0
    assert "each key/value head is on 4 devices" in capsys.readouterr().out
    assert main([*words, "8", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["padding"]
    assert cost["sizes"]["heads"] == [14, 16] and cost["copies"] == 4


def test_405_billion_parameters_in_seconds():
    """From a config alone, in less than 500 MB: under 5 s on a machine that has nothing else to do;
    here in at most three times what importing the libraries takes, in a processor's seconds."""
    imports = "import sys; sys.modules['torch'] = None; import flax.nnx; "
    imports += "from transformers import CONFIG_MAPPING; CONFIG_MAPPING['llama']"
    before = memory.processors()
    subprocess.run([sys.executable, "-c", imports], check=True, capture_output=True)
    importing = memory.processors() - before
    done = memory.run(["convert", str(BIG), "--dry-run", "--tensor", "8", "--json"])
    seen = {name: value for name, value in done.items() if name != "said"}
    assert done["exit"] == 0 and done["peak"] < 500e6, seen
    assert done["processor_seconds"] < max(5.0, 3 * importing), (seen, importing)
    plan = json.loads(done["said"])
    assert plan["parameters"] == 405_853_388_800
    assert plan["source_bytes"] == 2 * plan["parameters"]
    assert plan["bytes_per_device"] < 1.001 * plan["source_bytes"] / 8


# --- inspect


def test_inspect(bundled, capsys):
    """The same of both formats, but what each is and where its tensors lie."""
    hf, m = (told(capsys, "inspect", path) for path in (folders.bundled(), bundled))
    assert (hf["format"], m["format"]) == ("Hugging Face", "tpjax")
    for about in (hf, m):
        assert about["family"] == "llama" and about["supported"] and about["tied"]
        assert about["parameters"] == about["elements"] == 4_213_504
        assert about["dtypes"] == {"bfloat16": 47} and about["bytes"] == 2 * about["elements"]
        assert about["even_tensor_degrees"] == [1, 2, 4, 8] and about["problems"] == []
    assert (hf["files"], m["files"]) == (1, 47)
    assert main(["inspect", str(bundled), "--weights"]) == 0
    assert "embed.w  [2048, 256]  bfloat16" in capsys.readouterr().out


def test_inspect_reads_no_weights(bundled, tmp_path, capsys):
    """Bytes of data changed under it are not noticed: that is what verify is for."""
    copy = shutil.copytree(bundled, tmp_path / "m")
    flip(copy / "weights/embed.w/c/0/0", 5)
    assert told(capsys, "inspect", copy)["problems"] == []
    assert told(capsys, "verify", copy, code=1)["problems"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"num_hidden_layers": 2}, "missing model.layers.1"),
        ({"intermediate_size": 80}, "the config says [80, 64]"),
        ({"model_type": "odd"}, "unknown model_type 'odd'"),
    ],
)
def test_inspect_tells_what_does_not_match(folder, capsys, change, said):
    edit_json(folder / "config.json", **change)
    about = told(capsys, "inspect", folder, code=1)
    assert len(about["problems"]) == 1 and said in about["problems"][0]
    assert about["supported"] == ("model_type" not in change)


def test_inspect_of_dtypes_nobody_reads_here(folder, capsys):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / WEIGHTS)
    about = told(capsys, "inspect", folder, code=1)
    assert about["dtypes"] == {"float32": len(tensors) - 1, "I8": 1}
    assert about["bytes"] == sum(x.nbytes for x in tensors.values())
    assert "model.norm.weight is I8" in about["problems"][0]


# --- verify


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_verify_names_each_damaged_place(bundled, tmp_path, capsys):
    copy = shutil.copytree(bundled, tmp_path / "m")
    for name in ("embed.w/c/0/0", "norm.w/c/0", "norm.w/zarr.json"):
        flip(copy / "weights" / name, 100)
    flip(copy / "weights/blocks.0.attn.o.w/c/0/0", -3)  # the index
    flip(copy / "tokenizer.json", 1000)
    (copy / "weights/blocks.1.attn.o.w/c/0/0").unlink()
    with open(copy / "weights/blocks.2.attn.o.w/c/0/0", "ab") as file:
        file.write(b"more")
    assert main(["verify", str(copy), "--quiet"]) == 1
    out = capsys.readouterr().out
    for name in ("embed.w is damaged, in bytes 0 to", "norm.w is damaged", "norm.w/zarr.json"):
        assert name in out
    for name in ("blocks.0.attn.o.w is damaged in its index", "tokenizer.json: not the file"):
        assert name in out
    assert "No such file or directory (blocks.1.attn.o.w)" in out
    assert "blocks.2.attn.o.w needs" in out
    assert main(["verify", str(bundled), "--quiet"]) == 0


def test_verify_against_another_source(bundled, tmp_path, capsys):
    """One weight of the source changed by one bit, and its tokenizer."""
    copy = shutil.copytree(folders.bundled(), tmp_path / "hf")
    flip(copy / WEIGHTS, -1)
    flip(copy / "tokenizer_config.json", -3)
    problems = told(capsys, "verify", bundled, "--against", copy, code=1)["problems"]
    assert len(problems) == 2
    assert f"{copy / WEIGHTS}: model.norm.weight is not what norm.w was made from" in problems
    assert any("tokenizer_config.json" in line for line in problems)


def test_every_changed_byte_is_found(bundled, tmp_path):
    """The short form of `python -m checkpoints_tools.bench.corruption`: verify names the file of
    each, and none is loaded with verify="full"."""
    copy = shutil.copytree(bundled, tmp_path / "m")
    result = corruption.corrupt(copy, 40, seed=random.randrange(1 << 30), quiet=True)
    assert result["found"] == 40 and result["in_data"] > 10 and result["in_metadata"] > 5


def test_every_changed_byte_of_odd_sizes_is_found(tiny_model, tmp_path):
    """Where last chunks are filled up, along rows and along columns."""
    folder, _ = tiny_model(num_hidden_layers=1, vocab_size=331, intermediate_size=331)
    convert(folder, tmp_path / "m")
    result = corruption.corrupt(tmp_path / "m", 40, random.randrange(1 << 30), True, tensor=1)
    assert result["found"] == 40


def test_verify_logits(bundled, tmp_path, capsys):
    """Against the source's own logits: the same to rounding, layer by layer; against another
    model's: not, and the first layer that differs is told."""
    prompts = tmp_path / "prompts"
    prompts.write_text("ROMEO:\nO happy dagger\n")
    words = ("verify", bundled, "--against", folders.bundled(), "--logits", prompts)
    result = told(capsys, *words)["logits"]
    assert list(result["drift"]) == [
        "embedding",
        *(f"layer {n}" for n in range(5)),
        "norm",
        "logits",
    ]
    assert max(result["drift"].values()) < 1e-5 and result["prompts"] == 2

    from checkpoints_tools.logits import compare

    other = shutil.copytree(folders.bundled(), tmp_path / "other")
    edit_json(other / "config.json", rms_norm_eps=1e-2)
    problems = compare(bundled, other, prompts, 1)["problems"]
    assert "layer 0 differs" in problems[0] and "embedding" not in problems[0]


# --- kills


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """The short form of `python -m checkpoints_tools.bench.kills`."""
    make = [sys.executable, "-m", "checkpoints_tools.bench.synthetic", str(tmp_path / "source")]
    subprocess.run([*make, "--small", "--layers", "24"], check=True, capture_output=True)
    result = kills.kills(tmp_path / "source", tmp_path, 3, random.randrange(1 << 30), quiet=True)
    assert result["identical"] == 3 and result["before_the_end"] > 0


# --- a model on the hub


def test_a_hub_id_is_planned_from_headers(monkeypatch, tmp_path, capsys):
    """Neither a dry run nor inspect downloads a weight; the plan is that of the folder."""
    asked, folder = [], shutil.copytree(folders.bundled(), tmp_path / "hub")
    (folder / WEIGHTS).unlink()

    def download(name, *, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        return str(folder)

    source = SafetensorsFolder(folders.bundled())
    tensors = {
        name: SimpleNamespace(dtype=t.dtype, shape=list(t.shape))
        for name, t in source.tensors.items()
    }
    about = SimpleNamespace(files_metadata={WEIGHTS: SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name: about)
    hub = told(capsys, "convert", "org/name", "--dry-run")
    here = told(capsys, "convert", folders.bundled(), "--dry-run")
    assert hub.pop("source") == "org/name" and here.pop("source")
    assert hub == here
    assert told(capsys, "inspect", "org/name")["parameters"] == 4_213_504
    assert asked and not any("safetensors" in pattern or "bin" in pattern for pattern in asked)


def test_a_hub_without_safetensors(monkeypatch, tmp_path, capsys):
    """Converting then takes the legacy files; planning says why it cannot."""
    asked, folder = [], shutil.copytree(folders.bundled(), tmp_path / "hub")
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()

    def download(name, *, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        if "pytorch_model*.bin" in allow_patterns:
            state = {n: torch.from_numpy(x.astype(np.float32)) for n, x in tensors.items()}
            torch.save(state, folder / "pytorch_model.bin")
        return str(folder)

    def none(name):
        raise RuntimeError("not a safetensors repo")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", none)
    assert main(["convert", "org/name", "--dry-run"]) == 3
    assert "no safetensors headers (not a safetensors repo)" in capsys.readouterr().err
    assert told(capsys, "convert", "org/name", tmp_path / "m")["weights"] == 47
    assert len(asked) == 3
    assert Manifest.read(tmp_path / "m").source == "org/name"
