"""There and back: what is converted restores on every mesh, and is exported, bit for bit."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import checkpoints_tools.convert as converting
import tpjax
from checkpoints_tools import workers
from checkpoints_tools.bench import orbax_restore
from checkpoints_tools.convert import convert
from checkpoints_tools.export import export
from checkpoints_tools.sources import TORCH_INDEX, TORCH_SINGLE
from checkpoints_tools.staging import partial_of
from checkpoints_tools.verify import verify
from tests import reference
from tests.bad import INDEX, WEIGHTS, edit_json, refused
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint import load
from tpjax.checkpoint.manifest import Manifest
from tpjax.checkpoint.orbax import OrbaxFolder
from tpjax.checkpoint.safetensors import SafetensorsFolder
from tpjax.checkpoint.tensors import Tensors
from tpjax.errors import CheckpointError, RunError, UsageError
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan
from tpjax.weights import WeightTable

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
MESHES = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 4)]  # data, tensor; rep where heads are fewer


@dataclass(frozen=True)
class Case:
    """A model, and how it lies on disk."""

    facts: dict = field(default_factory=dict)
    dtype: str = "float32"
    sharded: bool = False


CASES = {
    "untied, grouped heads": Case(),
    "tied, bfloat16": Case({"tie_word_embeddings": True}, "bfloat16"),
    "biases, float16": Case({"attention_bias": True, "mlp_bias": True}, "float16"),
    "sharded, bfloat16": Case({"vocab_size": 256}, "bfloat16", sharded=True),
    "eight key/value heads": Case({"num_key_value_heads": 8}),
    "wide, an awkward MLP": Case({"intermediate_size": 344, "hidden_size": 256}),
}


@dataclass(frozen=True)
class Converted:
    case: Case
    source: Path
    folder: Path
    tensors: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def made(request, tiny_model, tmp_path_factory):
    """A checkpoint, converted."""
    case, root = request.param, tmp_path_factory.mktemp("converted")
    _, model = tiny_model(num_hidden_layers=2, **case.facts)
    size = "20KB" if case.sharded else "1GB"
    model.to(getattr(torch, case.dtype)).save_pretrained(root / "hf", max_shard_size=size)
    model.float()
    files = list((root / "hf").glob("*.safetensors"))
    assert (len(files) > 3) == case.sharded
    tensors = {name: x for file in files for name, x in load_file(file).items()}
    convert(root / "hf", root / "tpjax")
    return Converted(case, root / "hf", root / "tpjax", tensors)


def table_of(folder, mesh=(1, 1), dtype=None):
    model = folders.read_folder(folder)
    config = folders.with_dtype(model.config, dtype or model.stored_dtype)
    return WeightTable(config, Plan(mesh=make_mesh(*mesh)).fit(config)), model.family


def leaves(folder, mesh=(1, 1), dtype=None, verify=None):
    table, family = table_of(folder, mesh, dtype)
    return table, load.load(table, family, load.open_source(folder, verify))


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- there


@pytest.mark.parametrize("verify", ["fast", "full"])
@pytest.mark.parametrize("mesh", MESHES)
def test_restores_on_every_mesh(made, mesh, verify):
    """Every leaf is bit for bit the stored tensor and what loading the source itself gives, every
    device's slice too; at tensor=8 four key/value heads go over tensor=4 x rep=2."""
    table, restored = leaves(made.folder, mesh, verify=verify)
    _, direct = leaves(made.source, mesh)
    family = folders.read_folder(made.folder).family
    for spec, ours, theirs in zip(table.specs, restored, direct, strict=True):
        stored = made.tensors[family.name(spec.path)]
        assert stored.dtype == DTYPES[made.case.dtype]
        grow = [(0, n - m) for n, m in zip(spec.shape, stored.shape, strict=True)]
        whole = np.pad(stored, grow)
        assert same_bits(ours, whole) and same_bits(ours, theirs), spec.path
        assert ours.committed and ours.sharding == spec.sharding
        for shard in ours.addressable_shards:
            assert same_bits(shard.data, whole[shard.index]), (spec.path, shard.device)


@pytest.mark.parametrize("mesh", [(1, 1), (1, 2), (1, 8)])
@pytest.mark.parametrize("verify", ["fast", "full"])
def test_restores_by_several_threads(made, mesh, verify, monkeypatch):
    """As large slices are: divided, and nothing is read more often for it."""
    table, family = table_of(made.folder, mesh)
    alone, divided = OrbaxFolder(made.folder, verify), OrbaxFolder(made.folder, verify)
    expected = load.load(table, family, alone)
    monkeypatch.setattr(load, "_LARGE", 1)
    assert all(map(same_bits, load.load(table, family, divided), expected))
    assert all(map(same_bits, load.load(table, family, SafetensorsFolder(made.source)), expected))
    if verify == "fast":
        assert divided.bytes_read <= 1.02 * alone.bytes_read


def test_restores_in_another_dtype(made):
    for dtype in DTYPES:
        _, restored = leaves(made.folder, (1, 4), dtype)
        _, direct = leaves(made.source, (1, 4), dtype)
        assert all(map(same_bits, restored, direct))


@pytest.mark.parametrize("tensor", [1, 8])
def test_orbax_restores_it(made, tensor):
    """Orbax's own checkpointer: onto a mesh, and where it is told nothing about devices."""
    assert orbax_restore.differing(made.folder, tensor) == []
    restored = ocp.StandardCheckpointer().restore(made.folder / "weights")
    family = folders.read_folder(made.folder).family
    for path, leaf in jax.tree.leaves_with_path(restored):
        name = family.name(".".join(key.key for key in path))
        assert same_bits(leaf, made.tensors[name])


@pytest.mark.parametrize("verify", ["fast", "full"])
@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_a_device_reads_its_own_bytes(made, tensor, verify):
    """Of all that is split: its share, and at most 2 % of all more, even where whole chunks have to
    be read to be compared. (Key/value heads on several devices are split into fewer shares.)"""
    table, family = table_of(made.folder, (1, tensor))
    source, tensors = OrbaxFolder(made.folder, verify), Tensors(table, family)
    shares = {
        s.path: table.plan.shards(s.axes[s.split]) for s in table.specs if s.split is not None
    }
    size = {path: source.weights[path].layout.nbytes for path in shares}
    share = sum(size[path] / shares[path] for path in shares)
    if made.case.facts.get("num_key_value_heads") == 8:
        assert share == sum(size.values()) / tensor
    for device in table.plan.mesh.devices.flat:
        source.bytes_read = 0
        for spec in (table.by_path[path] for path in shares):
            index = spec.sharding.addressable_devices_indices_map(spec.shape)[device]
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, spec.shape, strict=True))
            load.read_slice(spec, source, tensors, bounds)
        assert 0 < source.bytes_read <= share + 0.02 * sum(size.values())


def test_verify_finds_nothing_at_any_degree(made):
    for tensor in (None, 1, 2, 4, 8):
        result = verify(made.folder, against=made.source, tensor=tensor)
        assert result["problems"] == [] and result["weights"] == len(made.tensors)
        assert result["tensor"] == (tensor or 2)


# --- and back


def test_export_is_the_original(made, tmp_path):
    """The same tensors in the same files; transformers loads them and says the same."""
    export(made.folder, tmp_path / "hf")
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == sorted(
        p.name for p in made.source.iterdir()
    )
    for file in made.source.glob("*.safetensors"):
        theirs, ours = load_file(file), load_file(tmp_path / "hf" / file.name)
        assert theirs.keys() == ours.keys()
        assert all(same_bits(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "hf/config.json").read_bytes() == (made.source / "config.json").read_bytes()
    ids = reference.prompt(20, 131)

    def says(folder):
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return reference.logits(model.eval(), ids)

    assert same_bits(says(tmp_path / "hf"), says(made.source))


def test_generates_the_same(made, quiet, request):
    """`LLM` opens either format; by default two of these."""
    usual = CASES["untied, grouped heads"], CASES["tied, bfloat16"]
    if made.case not in usual and not request.config.getoption("--every-case"):
        pytest.skip("with --every-case")
    prompts = [reference.prompt(9, 131)]
    params = tpjax.SamplingParams(temperature=0, max_tokens=8)
    a, b = (
        tpjax.LLM(path, 4, max_num_seqs=1, max_model_len=64, **quiet).generate(prompts, params)
        for path in (made.source, made.folder)
    )
    assert a[0].outputs[0].token_ids == b[0].outputs[0].token_ids


# --- how it is written


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def model(tiny_model):
    """Two layers, odd vocabulary and biases."""
    return tiny_model(num_hidden_layers=2, attention_bias=True, mlp_bias=True)[0]


@pytest.mark.parametrize("gb", [8e-7, 2e-6, 1e-5])
def test_in_slices(model, tmp_path, gb, monkeypatch):
    """With buffers of one row of the widest weight, and of more: the same bytes."""
    convert(model, tmp_path / "whole")
    for module in ("workers", "plan"):
        monkeypatch.setattr(f"checkpoints_tools.{module}.SCRATCH", 0)
    monkeypatch.setattr(workers, "ARENA", int(gb * 1e9))
    monkeypatch.setattr("checkpoints_tools.plan.ARENA", int(gb * 1e9))
    result = convert(model, tmp_path / "slices", max_host_gb=gb * 1.01)
    assert result["buffers_bytes"] <= gb * 1.01e9
    assert contents(tmp_path / "whole") == contents(tmp_path / "slices")


def test_is_the_same_every_time(model, tmp_path):
    """No times, no order of threads, and the mesh only in the manifest."""
    convert(model, tmp_path / "a")
    convert(model, tmp_path / "b", max_host_gb=0.03)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    convert(model, tmp_path / "c", tensor=8)
    a, c = contents(tmp_path / "a"), contents(tmp_path / "c")
    assert {path for path in a if a[path] != c[path]} == {Path("tpjax_manifest.json")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_casts(model, tmp_path, dtype, quiet):
    """As numpy rounds; the config says so, and verify compares the cast with the source."""
    convert(model, tmp_path / "m", dtype=dtype)
    stored = load_file(model / WEIGHTS)
    table, restored = leaves(tmp_path / "m")
    for spec, leaf in zip(table.specs, restored, strict=True):
        assert same_bits(leaf, stored[_name(spec.path)].astype(DTYPES[dtype]))
    about = json.loads((tmp_path / "m/config.json").read_text())
    assert about["dtype"] == dtype and about["vocab_size"] == 131
    result = verify(tmp_path / "m", against=model)
    assert result["problems"] == []
    export(tmp_path / "m", tmp_path / "hf")
    exported = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert exported.dtype == getattr(torch, dtype)


def _name(path):
    from tpjax.models import find

    return find("llama", "").name(path)


@pytest.mark.parametrize("nth", [0, 7, 30])
def test_what_was_not_written_is_noticed(model, tmp_path, nth, monkeypatch):
    """A run of bytes that does not reach the disk, of a weight cut either way."""
    put, calls = converting._put, []

    def lose(fd, layout, first, count, cut):
        calls.append(layout)
        put(fd, layout, first, count, cut if len(calls) != nth + 1 else np.zeros_like(cut))

    monkeypatch.setattr(converting, "_put", lose)
    with refused(RunError, "was not read back as it was written", "check the disk", "--resume"):
        convert(model, tmp_path / "m")
    monkeypatch.undo()
    assert not (tmp_path / "m").exists()
    convert(model, tmp_path / "m", resume=True)
    assert verify(tmp_path / "m", against=model)["problems"] == []


def test_mixed_dtypes_are_kept(model, tmp_path):
    """Norms in float32 in a bfloat16 model stay so on disk."""
    copy = shutil.copytree(model, tmp_path / "hf")
    tensors = load_file(model / WEIGHTS)
    mixed = {n: x if "norm" in n else x.astype(ml_dtypes.bfloat16) for n, x in tensors.items()}
    save_file(mixed, copy / WEIGHTS)
    convert(copy, tmp_path / "m")
    kinds = {w.source.name: w.dtype for w in Manifest.read(tmp_path / "m").weights}
    assert kinds == {name: x.dtype.name for name, x in mixed.items()}
    export(tmp_path / "m", tmp_path / "back")
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert all(same_bits(back[name], x) for name, x in mixed.items())


def test_tied_copies_come_back(tiny_model, tmp_path):
    """A file that holds the tied head too: compared, kept once, and exported again."""
    folder, _ = tiny_model(num_hidden_layers=1, tie_word_embeddings=True)
    copy = shutil.copytree(folder, tmp_path / "hf")
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(tensors | frequencies, copy / WEIGHTS)
    convert(copy, tmp_path / "m")
    manifest = Manifest.read(tmp_path / "m")
    assert [w.path for w in manifest.weights].count("head") == 0
    assert manifest.left_out == tuple(frequencies)
    export(tmp_path / "m", tmp_path / "back")
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert back.keys() == tensors.keys()
    assert all(same_bits(back[name], x) for name, x in tensors.items())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_legacy_files(model, tmp_path, dtype, sharded, mapped):
    """torch's own files, of the form that can be mapped and of the older one, give what
    safetensors give."""
    (tmp_path / "hf").mkdir()
    shutil.copy(model / "config.json", tmp_path / "hf")
    stored = {n: x.astype(DTYPES[dtype]) for n, x in load_file(model / WEIGHTS).items()}
    state = {
        n: torch.from_numpy(x.view(np.uint8)).view(getattr(torch, dtype)).reshape(x.shape)
        for n, x in stored.items()
    }
    names = sorted(state)
    parts = [names[:5], names[5:]] if sharded else [names]
    files = [f"pytorch_model-{n}.bin" for n in (1, 2)] if sharded else [TORCH_SINGLE]
    for file, part in zip(files, parts, strict=True):
        where = tmp_path / "hf" / file
        torch.save({n: state[n] for n in part}, where, _use_new_zipfile_serialization=mapped)
    if sharded:
        where = {n: f for f, part in zip(files, parts, strict=True) for n in part}
        (tmp_path / "hf" / TORCH_INDEX).write_text(json.dumps({"weight_map": where}))
    convert(tmp_path / "hf", tmp_path / "m")
    table, restored = leaves(tmp_path / "m", dtype=dtype)
    for spec, leaf in zip(table.specs, restored, strict=True):
        assert same_bits(leaf, stored[_name(spec.path)])
    assert verify(tmp_path / "m", against=tmp_path / "hf")["problems"] == []
    export(tmp_path / "m", tmp_path / "back")
    assert (tmp_path / "back" / INDEX).exists() == sharded
    assert transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back") is not None


# --- again


def test_resumes_without_converting_again(model, tmp_path, monkeypatch):
    """What the journal says is done is not read; the result is what an undisturbed run gives."""
    convert(model, tmp_path / "whole")
    count, limit = 0, 9
    from checkpoints_tools.staging import Staging

    record = Staging.record

    def stop(self, about):
        nonlocal count
        count += 1
        if count > limit:
            raise KeyboardInterrupt
        record(self, about)

    monkeypatch.setattr(Staging, "record", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "m")
    monkeypatch.undo()
    assert not (tmp_path / "m").exists() and partial_of(tmp_path / "m").exists()
    result = convert(model, tmp_path / "m", resume=True)
    done = limit - 1  # the first line says what the conversion is
    assert result["converted_now"] == result["weights"] - done
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")
    assert not partial_of(tmp_path / "m").exists()
    assert convert(model, tmp_path / "m", resume=True)["already_complete"]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_torn_journal_line_is_done_again(model, tmp_path, cut, monkeypatch):
    """And spoils no line that is written after it."""
    convert(model, tmp_path / "whole")
    monkeypatch.setattr("checkpoints_tools.convert._finish", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "m")
    monkeypatch.undo()
    journal = partial_of(tmp_path / "m") / ".tpjax-journal"
    journal.write_bytes(journal.read_bytes()[:-cut])
    monkeypatch.setattr("checkpoints_tools.convert._finish", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "m", resume=True)
    monkeypatch.undo()
    assert journal.read_bytes().count(b"\n") == 1 + len(Manifest.read(tmp_path / "whole").weights)
    assert convert(model, tmp_path / "m", resume=True)["converted_now"] == 0
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", ["manifest", "first rename", "second rename"])
def test_interrupted_while_committing(model, tmp_path, after, monkeypatch):
    """Between the last steps nothing is lost: the old checkpoint or the new one, whole."""
    convert(model, tmp_path / "m")
    old = contents(tmp_path / "m")
    edit = shutil.copytree(model, tmp_path / "hf")
    edit_json(edit / "config.json", rms_norm_eps=1e-6)
    rename, renames = Path.rename, []

    def stop(self, target):
        renames.append(target)
        if after == "manifest" or (after == "first rename" and len(renames) == 2):
            raise KeyboardInterrupt
        out = rename(self, target)
        if after == "second rename" and len(renames) == 2:
            raise KeyboardInterrupt
        return out

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(edit, tmp_path / "m", overwrite=True)
    monkeypatch.undo()
    if after == "manifest":
        assert contents(tmp_path / "m") == old
    assert not convert(edit, tmp_path / "m", overwrite=True)["already_complete"]
    convert(edit, tmp_path / "fresh")
    assert contents(tmp_path / "m") == contents(tmp_path / "fresh")
    assert {p.name for p in tmp_path.iterdir()} == {"m", "hf", "fresh"}


def test_a_replaced_checkpoint_is_given_back(model, tmp_path):
    """The old one was set aside and the new one is gone, whoever removed it."""
    convert(model, tmp_path / "m")
    old = contents(tmp_path / "m")
    work = partial_of(tmp_path / "m")
    work.mkdir()
    (work / ".tpjax-lock").touch()
    (tmp_path / "m").rename(work / "old-0")
    with refused(UsageError, "there is a checkpoint already", "--overwrite"):
        convert(model, tmp_path / "m")
    assert contents(tmp_path / "m") == old
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# --- what is somebody else's


def test_what_appears_meanwhile_stays(model, tmp_path):
    """A folder that came into being at DST while it was converted is not replaced unasked; the work
    is not lost."""
    dst = tmp_path / "m"

    def appear(count):
        dst.mkdir(exist_ok=True)
        (dst / "precious").write_text("data")

    with refused(UsageError, dst, "not empty"):
        convert(model, dst, on_bytes=appear)
    assert contents(dst) == {Path("precious"): b"data"}
    shutil.rmtree(dst)
    assert convert(model, dst, resume=True)["converted_now"] == 0
    convert(model, tmp_path / "fresh")
    assert contents(dst) == contents(tmp_path / "fresh")


def test_replacing_spares_what_is_not_of_the_checkpoint(model, tmp_path):
    convert(model, tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with refused(UsageError, "holds notes.txt", "move it"):
        convert(model, tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"


def test_replacing_a_damaged_checkpoint(model, tmp_path):
    """Whatever is wrong with it."""
    convert(model, tmp_path / "m")
    whole = contents(tmp_path / "m")
    for name in ("tpjax_manifest.json", "weights/norm.w/c/0", "config.json"):
        (tmp_path / "m" / name).write_bytes(b"no")
        convert(model, tmp_path / "m", overwrite=True)
        assert contents(tmp_path / "m") == whole


def test_a_finished_checkpoint_of_another_source(model, tmp_path):
    """--resume does not take it for its own."""
    other = shutil.copytree(model, tmp_path / "hf")
    convert(other, tmp_path / "m")
    assert convert(other, tmp_path / "m", resume=True)["already_complete"]
    tensors = {name: 2 * x for name, x in load_file(other / WEIGHTS).items()}
    save_file(tensors, other / WEIGHTS)
    with refused(UsageError, "made from another source, or it has changed", WEIGHTS):
        convert(other, tmp_path / "m", resume=True)


def test_a_torn_small_file(model, tmp_path, monkeypatch):
    """A kill while the manifest is written leaves no manifest; a resumed run writes it."""
    convert(model, tmp_path / "whole")
    replace = os.replace

    def stop(src, dst):
        if Path(dst).name == "tpjax_manifest.json":
            raise KeyboardInterrupt
        replace(src, dst)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "m")
    monkeypatch.undo()
    assert convert(model, tmp_path / "m", resume=True)["converted_now"] == 0
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


def test_a_link_as_the_destination(model, tmp_path):
    """Stands for what it points to."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "m")
    convert(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert verify(tmp_path / "disk" / "m", against=model)["problems"] == []
    convert(model, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and not partial_of(tmp_path / "disk" / "m").exists()


@pytest.mark.parametrize("size, width", [("vocab_size", 331), ("intermediate_size", 331)])
def test_every_byte_of_padding_counts(tiny_model, tmp_path, size, width, monkeypatch):
    """What fills up the last chunk, along rows and along columns: no weight tells of it."""
    folder, _ = tiny_model(num_hidden_layers=1, **{size: width})
    convert(folder, tmp_path / "m")
    monkeypatch.setattr("tpjax.checkpoint.orbax._SAMPLE", 0)
    name = "embed.w" if size == "vocab_size" else "blocks.0.mlp.down.w"
    weight = next(w for w in Manifest.read(tmp_path / "m").weights if w.path == name)
    layout = weight.layout
    assert layout.chunks * layout.width > width
    path = tmp_path / "m" / weight.file
    data = bytearray(path.read_bytes())
    data[layout.data_bytes - 1] ^= 1
    path.write_bytes(data)
    (problem,) = verify(tmp_path / "m")["problems"]
    assert f"{name} is damaged" in problem


def test_nonfinite_where_allowed_hides_no_overflow(model, tmp_path):
    """A NaN beside a number too large for the dtype."""
    copy = shutil.copytree(model, tmp_path / "hf")
    tensors = load_file(model / WEIGHTS)
    tensors["model.norm.weight"][:2] = np.nan, 1e30
    save_file(tensors, copy / WEIGHTS)
    with refused(CheckpointError, "model.norm.weight is too large for float16"):
        convert(copy, tmp_path / "m", dtype="float16", allow_nonfinite=True)
    assert convert(copy, tmp_path / "n", allow_nonfinite=True)["weights"]


def test_a_cast_to_what_it_is_changes_nothing(model, tmp_path):
    convert(model, tmp_path / "m", dtype="float32")
    assert verify(tmp_path / "m", against=model)["problems"] == []


def test_a_checkpoint_replaced_while_it_is_read(model, tmp_path):
    """Its weights would be of two."""
    convert(model, tmp_path / "m")
    table, family = table_of(tmp_path / "m")
    source = OrbaxFolder(tmp_path / "m")

    def replaced(specs):
        for number, spec in enumerate(specs):
            if number == 3:
                convert(model, tmp_path / "m", overwrite=True)
            yield spec

    with refused(CheckpointError, "was replaced while it was read"):
        load.load(table, family, source, replaced)
