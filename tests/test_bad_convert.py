"""Conversions that cannot be, and the one line that says so: sources, places, second runs, disks,
manifests. Nothing appears at DST, nothing that was there changes, and no code is run."""

import errno
import itertools
import json
import os
import pickle
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xxhash
from safetensors.numpy import load_file, save_file

import tpjax
from checkpoints_tools.cli import main
from checkpoints_tools.convert import convert
from checkpoints_tools.export import export
from checkpoints_tools.inspect import inspect
from checkpoints_tools.sources import TORCH_INDEX, TORCH_SINGLE
from checkpoints_tools.staging import Staging, partial_of, stage
from checkpoints_tools.verify import verify
from tests.bad import INDEX, NORM, WEIGHTS, Q, edit_json, edit_tensors, key, refused
from tpjax.checkpoint.manifest import MANIFEST, NewerFormat
from tpjax.errors import CheckpointError, ResourceError, RunError, UsageError

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HOW = [{}, {"overwrite": True}, {"resume": True}]
ONE_WORKER = {"max_host_gb": 0.03}  # one weight after the other: what fails first is known


@pytest.fixture
def dst(tmp_path):
    return tmp_path / "made"


@pytest.fixture(scope="module")
def converted(tiny_model, tmp_path_factory):
    """A finished checkpoint of the model in `folder`."""
    made, _ = tiny_model(num_hidden_layers=1)
    source = shutil.copytree(made, tmp_path_factory.mktemp("converted") / "model")
    convert(source, source.with_name("made"))
    return source.with_name("made")


@pytest.fixture
def made(converted, dst):
    return shutil.copytree(converted, dst)


def everything(folder):
    """Every path below a folder, with the bytes of the files."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


@contextmanager
def refused_whole(dst, error, *said):
    """`refused`, and beside DST not a byte appears, changes or goes; but weights that had been
    finished may be left in DST.partial."""
    before = everything(dst.parent)
    with refused(error, *said):
        yield
    after = everything(dst.parent)
    if finished(dst) and partial_of(dst).name not in before:
        after = {path: of for path, of in after.items() if partial_of(dst).name not in path}
    assert after == before


def fails(patch, call, code, after, times=1 << 60):
    """``os.call`` works ``after`` times, and then no more; or so many times not."""
    real, uses = getattr(os, call), itertools.count()

    def wrong(*args, **kwargs):
        if after <= next(uses) < after + times:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    patch.setattr(os, call, wrong)


def begin(folder, dst, monkeypatch):
    """A conversion that ends in the middle, some of its weights finished."""
    with monkeypatch.context() as patch, refused(ResourceError, "--resume"):
        fails(patch, "pwrite", errno.ENOSPC, 300)
        convert(folder, dst, **ONE_WORKER)
    assert finished(dst)


def finished(dst):
    """How many weights an unfinished conversion has on disk."""
    journal = partial_of(dst) / ".tpjax-journal"
    return len(journal.read_text().splitlines()) - 1 if journal.exists() else 0


def export_beside(folder):
    return export(folder, folder.with_name("exported"))


# --- sources


def shard(folder):
    """The same tensors in two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file({NORM: tensors.pop(NORM)}, folder / B)
    save_file(tensors, folder / A)
    where = dict.fromkeys(tensors, A) | {NORM: B}
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def write(change, file=B):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def point(file, name=NORM, index=INDEX):
    def change(folder):
        where = json.loads((folder / index).read_text())["weight_map"]
        (folder / index).write_text(json.dumps({"weight_map": where | {name: file}}))

    return change


def head(file=B, name=NORM, **facts):
    def change(raw):
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        header[name] |= facts
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + raw[end:]

    return write(change, file)


def config(**facts):
    return lambda folder: edit_json(folder / "config.json", **facts)


@pytest.mark.parametrize(
    "damage, where, said",
    [
        (write(lambda raw: raw[:-100]), B, "not fully covered"),
        (write(lambda raw: raw[:7]), B, "header too small"),
        (write(lambda raw: b"\xff\xff" + raw[2:]), B, "header length"),
        (write(lambda raw: b"\xff" * 8 + raw[8:]), B, "header too large"),
        (head(A, Q, data_offsets=[0, 16384]), A, "invalid offset"),
        (head(data_offsets=[8, 264]), B, "invalid offset"),
        (head(data_offsets=[256, 0]), B, "not a whole safetensors file"),
        (head(data_offsets=[0, 1 << 50]), B, "not a whole safetensors file"),
        (head(shape=[1 << 62, 1 << 62]), B, "not a whole safetensors file"),
        (head(shape=[1 << 70]), B, "not a whole safetensors file"),
        (head(shape=[8, 8]), "", f"{NORM} is [8, 8], the config says [64]"),
        (head(shape=[32], dtype="F64"), "", f"{NORM} is F64: readable are F32, BF16, F16"),
        (head(shape=[256], dtype="I8"), "", f"{NORM} is I8: readable are F32, BF16, F16"),
        (lambda folder: (folder / B).unlink(), INDEX, f"{B!r}, which is not there"),
        (point("gone.safetensors"), INDEX, "'gone.safetensors', which is not there"),
        (point(f"../{B}"), INDEX, f"'../{B}' points outside the folder"),
        (point("/etc/passwd"), INDEX, "'/etc/passwd' points outside the folder"),
        (point(A), INDEX, f"not in the file the index names: {NORM}"),
        (lambda folder: shutil.copy(folder / A, folder / B), B, f"and so does {A}"),
        (config(num_hidden_layers=2), "", "missing model.layers.1"),
        (config(vocab_size=132), "", "the config says [132, 64]"),
        (config(tie_word_embeddings=True), "", "says that lm_head.weight is model.embed_tokens"),
        (write(lambda raw: raw[:-4] + b"\0\0\xc0\x7f"), B, f"{NORM} holds a NaN or an infinity"),
        (write(lambda raw: raw[:-4] + b"\0\0\x80\x7f"), B, f"{NORM} holds a NaN or an infinity"),
        (write(lambda raw: raw[:-4] + b"\0\0\x80\x47"), B, f"{NORM} is too large for float16"),
    ],
)
def test_a_source_that_cannot_be(folder, dst, damage, where, said):
    """The last number is 65536, the one float16 ends before."""
    shard(folder)
    damage(folder)
    with refused_whole(dst, CheckpointError, folder / where, said):
        convert(folder, dst, dtype="float16")


def test_what_is_not_finite_needs_a_word(folder, dst):
    """With it, it is converted; and still nothing that a model would run with."""
    edit_tensors(folder, **{key(Q): np.full((64, 64), np.inf, np.float32)})
    with refused_whole(dst, CheckpointError, folder / WEIGHTS, Q, "--allow-nonfinite"):
        convert(folder, dst)
    convert(folder, dst, overwrite=True, allow_nonfinite=True)
    assert verify(dst)["problems"] == []
    with refused(CheckpointError, dst, "blocks.0.attn.q.w holds a NaN or an infinity"):
        tpjax.LLM(dst, 4, say=lambda line: None)


# --- legacy files


def legacy(change=lambda tensors: tensors, size=None):
    """The same tensors as torch once saved them; or another state; or a part of the file."""

    def make(folder):
        tensors = {n: torch.from_numpy(t) for n, t in load_file(folder / WEIGHTS).items()}
        torch.save(change(tensors), folder / TORCH_SINGLE)
        os.truncate(folder / TORCH_SINGLE, size or os.path.getsize(folder / TORCH_SINGLE))

    return make


def legacy_shards(file):
    """Two files with an index, which says that NORM is in ``file``."""

    def make(folder):
        legacy()(folder)
        (folder / TORCH_SINGLE).rename(folder / "a.bin")
        shutil.copy(folder / "a.bin", folder / "b.bin")
        where = dict.fromkeys(load_file(folder / WEIGHTS), "a.bin") | {NORM: file}
        (folder / TORCH_INDEX).write_text(json.dumps({"weight_map": where}))

    return make


@pytest.mark.parametrize(
    "damage, where, said",
    [
        (legacy(size=1), TORCH_SINGLE, "damaged"),
        (legacy(size=30_000), TORCH_SINGLE, "torch cannot read it"),
        (legacy(lambda t: list(t.values())), TORCH_SINGLE, "holds a list"),
        (legacy(lambda t: t | {"step": 5}), TORCH_SINGLE, "'step' is a int"),
        (legacy(lambda t: t | {NORM: t[NORM].double()}), "", f"{NORM} is torch.float64"),
        (legacy(lambda t: t | {NORM: t[NORM][:3]}), "", f"{NORM} is [3]"),
        (legacy(lambda t: t | {Q: t[Q].to_sparse()}), TORCH_SINGLE, Q),
        (legacy(lambda t: t | {Q: t[Q].to("meta")}), TORCH_SINGLE, Q),
        (legacy_shards("../b.bin"), TORCH_INDEX, "'../b.bin' points outside"),
        (legacy_shards("/etc/b.bin"), TORCH_INDEX, "'/etc/b.bin' points outside"),
        (legacy_shards("gone.bin"), TORCH_INDEX, "'gone.bin', which is not there"),
        (legacy_shards("b.bin"), "b.bin", "and so does a.bin"),
    ],
)
def test_a_legacy_source_that_cannot_be(folder, dst, damage, where, said):
    damage(folder)
    (folder / WEIGHTS).unlink()
    with refused_whole(dst, CheckpointError, folder / where, said):
        convert(folder, dst)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code(folder, dst, tmp_path, zipped):
    proof = tmp_path / "ran"
    if zipped:
        legacy(lambda tensors: tensors | {"evil": Evil(proof)})(folder)
    else:
        (folder / TORCH_SINGLE).write_bytes(pickle.dumps({NORM: Evil(proof)}, protocol=2))
    (folder / WEIGHTS).unlink()
    said = (folder / TORCH_SINGLE, "run code", "safetensors")
    with refused_whole(dst, CheckpointError, *said):
        convert(folder, dst)
    assert not proof.exists()
    with (folder / TORCH_SINGLE).open("rb") as file:  # it would have
        torch.load(file, weights_only=False) if zipped else pickle.load(file)
    assert proof.exists()


# --- places


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "place, said",
    [
        ("model/made", "inside the source"),
        ("model", "not empty, and no tpjax checkpoint"),
        ("", "not empty, and no tpjax checkpoint"),
        ("link", "not empty, and no tpjax checkpoint"),
        ("link/made", "inside the source"),
        ("x" * 250, "the name is too long"),
        ("full", "not empty, and no tpjax checkpoint"),
        ("full/file", "a file; give a new folder"),
        ("full/file/made", "full/file is a file; give"),
    ],
)
def test_a_place_that_cannot_be(folder, tmp_path, dst, place, said, how):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    (tmp_path / "link").symlink_to(folder)
    with refused_whole(dst, UsageError, (tmp_path / place).resolve(), said):
        convert(folder, tmp_path / place, **how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("place", ["made.partial", "made.partial/new"])
def test_a_source_in_the_work_folder(folder, dst, place, how):
    """DST.partial is emptied, renamed and removed."""
    partial_of(dst).mkdir()
    source = folder.rename(dst.with_name("x")).rename(dst.parent / place)
    with refused_whole(dst, UsageError, source):
        convert(source, dst, **how)


@pytest.mark.parametrize("verb", [convert, export])
def test_a_work_folder_that_is_somebody_elses(folder, made, verb):
    """Nothing that this tool has not made goes."""
    work = partial_of(made.with_name("other"))
    work.mkdir()
    (work / "precious").write_text("data")
    for how in HOW if verb is convert else HOW[:1]:
        with refused_whole(made, UsageError, work, "not this tool's"):
            verb(folder if verb is convert else made, made.with_name("other"), **how)


def test_a_finished_checkpoint_is_not_replaced_unasked(folder, made):
    for how in ({}, {"dtype": "bfloat16", "resume": True}):
        with refused_whole(made, UsageError, made, "--overwrite replaces it"):
            convert(folder, made, **how)


# --- second runs


def test_an_unfinished_conversion_is_not_touched_unasked(folder, dst, monkeypatch):
    begin(folder, dst, monkeypatch)
    with refused_whole(dst, UsageError, partial_of(dst), "--resume", "--overwrite"):
        convert(folder, dst)


@pytest.mark.parametrize("change", ["mtime", "size", "config"])
def test_resuming_with_another_source(folder, dst, monkeypatch, change):
    begin(folder, dst, monkeypatch)
    file = folder / ("config.json" if change == "config" else WEIGHTS)
    if change == "size":
        edit_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)})
    os.utime(file, ns=(5, 5))
    said = (partial_of(dst), "the source has changed", file.name, "--overwrite starts again")
    with refused_whole(dst, CheckpointError, *said):
        convert(folder, dst, resume=True)


@pytest.mark.parametrize("nearly", [False, True], ids=["in the middle", "all but the renaming"])
def test_resuming_with_another_dtype(folder, dst, monkeypatch, nearly):
    if nearly:
        with monkeypatch.context() as patch, refused(RunError, dst):
            fails(patch, "rename", errno.EIO, 0)
            convert(folder, dst)
    else:
        begin(folder, dst, monkeypatch)
    with refused_whole(dst, UsageError, partial_of(dst), "another dtype", "--overwrite"):
        convert(folder, dst, dtype="bfloat16", resume=True)


@pytest.mark.parametrize("how", HOW)
def test_a_second_converter(folder, dst, how):
    said = (dst, f"another process (number {os.getpid()})", "wait for it")
    with stage(dst) as first:
        first.start({"files": {}}, resume=False)
        with refused_whole(dst, ResourceError, *said):
            convert(folder, dst, **how)
    assert list(dst.parent.iterdir()) == [folder]


@pytest.mark.parametrize("late", [False, True])
def test_an_unfinished_checkpoint_is_none(folder, dst, monkeypatch, late):
    """Whatever is asked of it, before or after config.json is there."""
    if late:
        write = Staging.write

        def stop(self, name, content):
            if name == MANIFEST:
                raise RunError("stopped")
            write(self, name, content)

        with monkeypatch.context() as patch, refused(RunError, "stopped"):
            patch.setattr(Staging, "write", stop)
            convert(folder, dst)
    else:
        begin(folder, dst, monkeypatch)
    partial = partial_of(dst)
    assert (partial / "new" / "config.json").exists() == late
    for verb in (inspect, tpjax.LLM):
        with refused_whole(dst, CheckpointError, partial, "unfinished conversion"):
            verb(partial)
    for verb in (verify, export_beside, lambda src: convert(src, dst.with_name("other"))):
        with refused_whole(dst, CheckpointError, partial):
            verb(partial)


# --- disks and memory


def test_no_space_is_told_before_anything_is_written(folder, dst, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    monkeypatch.setattr(os, "pwrite", None)
    with refused_whole(dst, ResourceError, dst.parent, "more are needed", "0.00 GB are free"):
        convert(folder, dst)


@pytest.mark.parametrize("dst_is_there", [False, True])
@pytest.mark.parametrize(
    "call, after",
    [("write", 0), ("write", 1), ("write", 9), ("pwrite", 0), ("pwrite", 300), ("fsync", 0)]
    + [("fsync", 9), ("fsync", 30), ("fsync", 60), ("mkdir", 0), ("mkdir", 5)],
)
def test_a_disk_that_is_full(folder, converted, dst, monkeypatch, call, after, dst_is_there):
    """Wherever it happens: what was there stays, and a second run makes the very same checkpoint,
    going on where there is something finished."""
    if dst_is_there:
        shutil.copytree(converted, dst)
    before = everything(dst)
    with monkeypatch.context() as patch, refused(ResourceError, dst.parent, "no space", "--resume"):
        fails(patch, call, errno.ENOSPC, after)
        convert(folder, dst, **ONE_WORKER, overwrite=dst_is_there)
    assert everything(dst) == before
    done = finished(dst) > 0
    assert partial_of(dst).exists() == done == (after > 8)
    shutil.rmtree(dst, ignore_errors=True)
    result = convert(folder, dst, resume=True)
    assert (result["converted_now"] < result["weights"]) == done
    assert everything(dst) == everything(converted)


def test_a_renaming_that_fails(folder, made, converted, monkeypatch):
    """Between the old checkpoint's going and the new one's coming."""
    with monkeypatch.context() as patch, refused(RunError, made, "Input/output error"):
        fails(patch, "rename", errno.EIO, 1, times=1)
        convert(folder, made, overwrite=True)
    assert everything(made) == everything(converted)


def test_a_work_folder_that_cannot_be_removed(folder, made, converted, monkeypatch):
    """As on network file systems while a file in it is open: the checkpoint is there all the same,
    and nothing is in the way of the next one."""
    for _ in range(2):
        with monkeypatch.context() as patch:
            fails(patch, "rmdir", errno.ENOTEMPTY, 0)
            convert(folder, made, overwrite=True)
        assert everything(made) == everything(converted)
    convert(folder, made, overwrite=True)
    assert everything(made) == everything(converted) and not partial_of(made).exists()


def test_a_disk_that_cannot_be_read(folder, dst, monkeypatch):
    fails(monkeypatch, "preadv", errno.EIO, 0)
    said = ("cannot be read at byte", "Input/output error", "check the disk")
    with refused_whole(dst, CheckpointError, folder / WEIGHTS, *said):
        convert(folder, dst)


def test_a_small_file_that_cannot_be_read(folder, dst, monkeypatch):
    read, file = Path.read_bytes, folder / "generation_config.json"

    def wrong(path):
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", wrong)
    with refused(CheckpointError, file, "Permission denied"):
        convert(folder, dst)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda file: os.truncate(file, 9000), "cut while it was read"),
        (lambda file: os.utime(file, ns=(5, 5)), "has changed while it was converted"),
    ],
)
def test_a_source_that_changes_while_it_is_read(folder, dst, change, said):
    with refused(CheckpointError, folder, said):
        convert(folder, dst, **ONE_WORKER, on_bytes=lambda count: change(folder / WEIGHTS))
    assert not dst.exists()


def test_buffers_too_small_for_a_row(folder, dst):
    """What is said to be enough, is."""
    with refused_whole(dst, UsageError, "--max-host-gb 0.001", "one row", "at least"):
        convert(folder, dst, max_host_gb=0.001)
    with pytest.raises(UsageError) as caught:
        convert(folder, dst, max_host_gb=0.0005)
    least = float(re.search(r"at least ([\d.]+)", str(caught.value))[1])
    assert convert(folder, dst, max_host_gb=least)["buffers_bytes"] <= least * 1e9


@pytest.mark.parametrize(
    "how",
    [{"max_host_gb": gb} for gb in (0, -1, float("nan"), float("inf"))] + [{"dtype": "int8"}],
)
def test_arguments_that_cannot_be_meant(folder, dst, how):
    with refused_whole(dst, UsageError, *how.values()):
        convert(folder, dst, **how)


@pytest.mark.parametrize(
    "verb, code, said",
    [
        ("convert SRC DST --max-host-gb 0", 2, "--max-host-gb 0: give a number above 0"),
        ("convert SRC DST --max-host-gb -1", 2, "--max-host-gb -1"),
        ("convert SRC DST --max-host-gb nan", 2, "--max-host-gb nan"),
        ("convert SRC DST --max-host-gb 0.001", 2, "give at least 0.00"),
        ("convert SRC DST --tensor 0", 2, "= 0: from 1 to "),
        ("convert SRC DST --tensor 9", 4, "needs 9 devices"),
        ("convert SRC DST --resume --overwrite", 2, "give one of them"),
        ("convert SRC", 2, "needs DST"),
        ("convert SRC SRC/made", 2, "inside the source"),
        ("convert ./gone DST", 3, "no such folder"),
        ("verify SRC", 3, f"no {MANIFEST}"),
        ("verify SRC --tensor 0", 2, "--tensor 0"),
        ("export SRC DST", 3, f"no {MANIFEST}"),
        ("inspect ./gone", 3, "no such folder"),
        ("convert SRC/config.json DST", 2, "only be planned: add --dry-run"),
        ("convert MADE DST", 2, "is a tpjax checkpoint already"),
        ("convert SRC DST", 4, "no space left"),
    ],
)
def test_the_command_says_it(folder, dst, converted, capsys, monkeypatch, verb, code, said):
    """In one line, on standard error."""
    before = everything(dst.parent)
    for word, path in (("SRC", folder), ("DST", dst), ("MADE", converted)):
        verb = verb.replace(word, str(path))
    with monkeypatch.context() as patch:
        fails(patch, "pwrite", errno.ENOSPC, 0)
        assert main([*verb.split(), "--quiet"]) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    assert err.startswith("tpjax-checkpoint: error: ") and said in err
    assert everything(dst.parent) == before


# --- manifests


def edit_manifest(folder, change):
    """A manifest changed and sealed again, like `Manifest.sealed` does it."""
    about = json.loads((folder / MANIFEST).read_bytes())
    del about["digest"]
    change(about)
    body = json.dumps(about, indent=1).encode()[:-2]
    seal = f',\n "digest": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'
    (folder / MANIFEST).write_bytes(body + seal.encode())


def load(folder):
    return tpjax.LLM(folder, say=lambda line: None)


@pytest.mark.parametrize("read", [load, verify, export_beside])
def test_a_newer_format(made, tmp_path, read):
    edit_manifest(made, lambda about: about.update(version=2, weights="of another kind"))
    before = everything(tmp_path)
    with pytest.raises(NewerFormat, match=r"tpjax_manifest.json: of format 2.* upgrade tpjax$"):
        read(made)
    assert NewerFormat.exit_code == 3 and everything(tmp_path) == before


def test_a_manifest_edited_by_hand(made, capsys):
    """One digit: refused where the checkpoint is used, told where it is looked at."""
    write(lambda raw: raw.replace(b"64", b"65", 1), MANIFEST)(made)
    said = f"{made / MANIFEST}: damaged or edited"
    for use in (load, export_beside):
        with refused_whole(made, CheckpointError, said, "convert the source again"):
            use(made)
    for look in (verify, inspect):
        (problem,) = look(made)["problems"]
        assert said in problem
    assert main(["verify", str(made), "--quiet"]) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("where", ["source", "copy"])
@pytest.mark.parametrize("to", ["../out", "/out", "a\0b", 5])
def test_an_export_that_would_write_elsewhere(made, tmp_path, where, to):
    """A manifest may come from anywhere, and its digest is no signature."""

    def change(about):
        first = about["weights"][0]
        moved = first["source"] | {"file": f"{tmp_path}/out" if to == "/out" else to}
        if where == "copy":
            about["copies"] = {first["path"]: moved}
        else:
            first["source"] = moved

    edit_manifest(made, change)
    with refused_whole(made, CheckpointError, made):
        export_beside(made)


def test_names_that_would_write_lines_of_their_own(folder, capsys):
    """Whatever a tensor is called, it stays on its line; and it can be printed."""
    shard(folder)
    tensors = load_file(folder / B) | {"a\nproblem: \x1b[2Jb": np.ones(1, np.float32)}
    save_file(tensors, folder / B)
    assert main(["inspect", str(folder), "--weights"]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and len(re.findall("^problem:", out, re.M)) == 1
    point(A, "\ud800")(folder)
    assert main(["inspect", str(folder)]) == 1
    assert "1 tensor(s) are not in the file" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["full", "nonsense"])
def test_ways_to_verify(folder, made, how):
    said = "needs a tpjax checkpoint" if how == "full" else "known are fast, full"
    with refused(UsageError, f"verify={how!r}", said):
        tpjax.LLM(folder, verify=how)
    with refused(UsageError, "verify='nonsense'", "known are fast, full"):
        tpjax.LLM(made, verify="nonsense")
