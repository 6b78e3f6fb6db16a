"""Conversions that cannot be, and the one line that says so: sources, places, disks, second runs,
manifests. Nothing appears at DST, nothing that was there changes, and no code is run."""

import errno
import itertools
import json
import os
import pickle
import re
import shutil
from contextlib import contextmanager, suppress
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
from checkpoints_tools.staging import Staging, partial_of, replaced_of, stage
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
    """A finished checkpoint of `folder`'s model, to be copied."""
    made, _ = tiny_model(num_hidden_layers=1)
    source = shutil.copytree(made, tmp_path_factory.mktemp("converted") / "model")
    convert(source, source.with_name("made"))
    return source.with_name("made")


@pytest.fixture
def made(converted, dst):
    return shutil.copytree(converted, dst)


def everything(folder):
    """Every path below a folder, with the bytes of the files."""
    found = sorted(folder.rglob("*"))
    return {path: path.read_bytes() if path.is_file() else None for path in found}


@contextmanager
def refused_whole(tmp_path, error, *said):
    """`refused`, and not a byte of source, DST or DST.partial appears, changes or goes."""
    before = everything(tmp_path)
    with refused(error, *said):
        yield
    after = everything(tmp_path)
    assert sorted(after) == sorted(before)
    assert after == before


def fails(patch, call, code, after):
    """``os.call`` works ``after`` times, and then no more."""
    real, uses = getattr(os, call), itertools.count()

    def wrong(*args, **kwargs):
        if next(uses) >= after:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    patch.setattr(os, call, wrong)


def begin(folder, dst, monkeypatch, **how):
    """A conversion that ends in the middle, some of its weights finished."""
    with monkeypatch.context() as patch, refused(ResourceError, "--resume"):
        fails(patch, "pwrite", errno.ENOSPC, 300)
        convert(folder, dst, **ONE_WORKER, **how)
    assert len((partial_of(dst) / ".journal").read_text().splitlines()) > 1


# --- sources


def shard(folder):
    """The same tensors in two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    where = {name: B if name == NORM else A for name in tensors}
    for file in (A, B):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def edit_header(file, name=NORM, **facts):
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header[name] |= facts
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def write(file, change):
    file.write_bytes(change(file.read_bytes()))


def point(folder, file, name=NORM):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage, where, said",
    [
        (lambda f: write(f / B, lambda raw: raw[:-100]), B, "not fully covered"),
        (lambda f: write(f / B, lambda raw: raw[:7]), B, "header too small"),
        (lambda f: write(f / B, lambda raw: b"\xff\xff" + raw[2:]), B, "header length"),
        (lambda f: write(f / B, lambda raw: b"\xff" * 8 + raw[8:]), B, "header too large"),
        (lambda f: edit_header(f / A, Q, data_offsets=[0, 16384]), A, "invalid offset"),
        (lambda f: edit_header(f / B, data_offsets=[8, 264]), B, "invalid offset"),
        (lambda f: edit_header(f / B, data_offsets=[256, 0]), B, "whole safetensors file"),
        (lambda f: edit_header(f / B, data_offsets=[0, 1 << 50]), B, "whole safetensors file"),
        (lambda f: edit_header(f / B, shape=[1 << 62, 1 << 62]), B, "whole safetensors file"),
        (lambda f: edit_header(f / B, shape=[1 << 70]), B, "whole safetensors file"),
        (lambda f: (f / B).unlink(), INDEX, f"{B!r}, which is not there"),
        (lambda f: point(f, "gone.safetensors"), INDEX, "'gone.safetensors', which is not there"),
        (lambda f: point(f, f"../{B}"), INDEX, f"'../{B}' points outside the folder"),
        (lambda f: point(f, "/etc/passwd"), INDEX, "'/etc/passwd' points outside the folder"),
        (lambda f: point(f, A), INDEX, f"not in the file the index names: {NORM}"),
        (lambda f: shutil.copy(f / A, f / B), B, "so does model-00001-of-00002"),
        (lambda f: edit_header(f / B, shape=[8, 8]), "", f"{NORM} is [8, 8], the config says [64]"),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=2), "", "missing model.layers.1"),
        (lambda f: edit_json(f / "config.json", vocab_size=132), "", "the config says [132, 64]"),
    ],
)
def test_a_source_that_cannot_be(folder, dst, tmp_path, damage, where, said):
    shard(folder)
    damage(folder)
    with refused_whole(tmp_path, CheckpointError, folder / where, said):
        convert(folder, dst)


def test_a_tied_copy_that_is_none(folder, dst):
    edit_json(folder / "config.json", tie_word_embeddings=True)
    said = ("lm_head.weight is model.embed_tokens.weight", "other values", "to false")
    with refused(CheckpointError, folder, *said):
        convert(folder, dst)
    assert not dst.exists()


@pytest.mark.parametrize("dtype, word", [(np.float64, "F64"), (np.int8, "I8")])
def test_a_dtype_that_is_no_weights(folder, dst, tmp_path, dtype, word):
    edit_tensors(folder, **{key(NORM): np.ones(64, dtype)})
    with refused_whole(tmp_path, CheckpointError, folder, f"{NORM} is {word}", "F32, BF16, F16"):
        convert(folder, dst)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_needs_a_word(folder, dst, tmp_path, bad):
    """Named; with the word for it converted, and still nothing that a model would run with."""
    value = np.ones((64, 64), np.float32)
    value[-1, -1] = bad
    edit_tensors(folder, **{key(Q): value})
    said = (f"{folder / WEIGHTS}: {Q} holds a NaN or an infinity", "--allow-nonfinite")
    with refused(CheckpointError, *said):
        convert(folder, dst)
    assert not dst.exists()
    convert(folder, dst, overwrite=True, allow_nonfinite=True)
    assert verify(dst)["problems"] == []
    with refused(CheckpointError, dst, "blocks.0.attn.q.w holds a NaN or an infinity"):
        tpjax.LLM(dst, 4, say=lambda line: None)


def test_a_value_too_large_for_the_dtype(folder, dst):
    edit_tensors(folder, **{key(NORM): np.full(64, 65520, np.float32)})
    said = (folder / WEIGHTS, f"{NORM} is too large for float16", "bfloat16 or float32")
    with refused(CheckpointError, *said):
        convert(folder, dst, dtype="float16")
    assert not dst.exists()


# --- legacy files


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


def legacy(folder, state=None, file=TORCH_SINGLE):
    """The same tensors as torch once saved them, or another state."""
    tensors = {n: torch.from_numpy(t) for n, t in load_file(folder / WEIGHTS).items()}
    torch.save(tensors if state is None else state(tensors), folder / file)


def cut(folder):
    legacy(folder)
    write(folder / TORCH_SINGLE, lambda raw: raw[: len(raw) // 2])


def indexed(folder, **where):
    legacy(folder)
    (folder / TORCH_SINGLE).rename(folder / "a.bin")
    shutil.copy(folder / "a.bin", folder / "b.bin")
    tensors = dict.fromkeys(load_file(folder / WEIGHTS), "a.bin")
    (folder / TORCH_INDEX).write_text(json.dumps({"weight_map": tensors | {NORM: where["norm"]}}))


@pytest.mark.parametrize(
    "damage, where, said",
    [
        (cut, TORCH_SINGLE, "torch cannot read it"),
        (lambda f: (f / TORCH_SINGLE).write_bytes(b""), TORCH_SINGLE, "torch cannot read it"),
        (lambda f: (f / TORCH_SINGLE).write_bytes(b"x" * 999), TORCH_SINGLE, "damaged"),
        (lambda f: legacy(f, lambda t: list(t.values())), TORCH_SINGLE, "holds a list"),
        (lambda f: legacy(f, lambda t: t | {"step": 5}), TORCH_SINGLE, "'step' is a int"),
        (lambda f: legacy(f, lambda t: t | {NORM: t[NORM].double()}), "", "float64"),
        (lambda f: legacy(f, lambda t: t | {NORM: t[NORM][:3]}), "", f"{NORM} is [3]"),
        (lambda f: legacy(f, lambda t: t | {Q: t[Q].to_sparse()}), TORCH_SINGLE, Q),
        (lambda f: legacy(f, lambda t: t | {Q: t[Q].to("meta")}), TORCH_SINGLE, Q),
        (lambda f: indexed(f, norm="../b.bin"), TORCH_INDEX, "'../b.bin' points outside"),
        (lambda f: indexed(f, norm="/etc/b.bin"), TORCH_INDEX, "'/etc/b.bin' points outside"),
        (lambda f: indexed(f, norm="gone.bin"), TORCH_INDEX, "'gone.bin', which is not there"),
        (lambda f: indexed(f, norm="b.bin"), "b.bin", "so does a.bin"),
    ],
)
def test_a_legacy_source_that_cannot_be(folder, dst, damage, where, said):
    damage(folder)
    (folder / WEIGHTS).unlink()
    with refused(CheckpointError, folder / where, said):
        convert(folder, dst)
    assert not dst.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code(folder, dst, tmp_path, zipped):
    proof = tmp_path / "ran"
    if zipped:
        legacy(folder, lambda tensors: tensors | {"evil": Evil(proof)})
    else:
        (folder / TORCH_SINGLE).write_bytes(pickle.dumps({NORM: Evil(proof)}, protocol=2))
    (folder / WEIGHTS).unlink()
    said = (folder / TORCH_SINGLE, "run code", "safetensors")
    with refused_whole(tmp_path, CheckpointError, *said):
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
        (lambda t: t / "model" / "made", "inside the source"),
        (lambda t: t / "model", "inside the source"),
        (lambda t: t, "or around it"),
        (lambda t: t / "link", "inside the source"),
        (lambda t: t / "full", "not empty, and no tpjax checkpoint"),
        (lambda t: t / "file", "a file; give a new folder"),
    ],
)
def test_a_place_that_cannot_be(folder, tmp_path, place, said, how):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("data")
    (tmp_path / "file").write_text("data")
    (tmp_path / "link").symlink_to(folder)
    with refused_whole(tmp_path, UsageError, place(tmp_path), said):
        convert(folder, place(tmp_path), **how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [partial_of, replaced_of])
def test_a_source_with_the_name_of_a_working_folder(folder, dst, name, how):
    """DST.partial and DST.replaced are emptied, renamed and removed; not if they are the source."""
    source = folder.rename(name(dst))
    before = everything(source)
    with suppress(UsageError):
        convert(source, dst, **how)
    assert everything(source) == before


@pytest.mark.parametrize("verb", [convert, export])
@pytest.mark.parametrize("name", [partial_of, replaced_of])
def test_a_working_folder_that_is_somebody_elses(folder, made, tmp_path, name, verb):
    """Nothing that this tool has not made goes, but by the user's word."""
    precious = name(tmp_path / "other") / "precious"
    precious.parent.mkdir()
    precious.write_text("data")
    with suppress(UsageError):
        verb(folder if verb is convert else made, tmp_path / "other")
    assert precious.read_text() == "data"


def test_a_parent_that_is_a_file(folder, tmp_path):
    (tmp_path / "file").touch()
    with refused_whole(tmp_path, RunError, tmp_path / "file", "Not a directory"):
        convert(folder, tmp_path / "file" / "made")


def test_a_finished_checkpoint_is_not_replaced(folder, made, tmp_path):
    with refused_whole(tmp_path, UsageError, made, "--overwrite replaces it"):
        convert(folder, made)
    with refused_whole(tmp_path, UsageError, made, "--overwrite replaces it"):
        convert(folder, made, dtype="bfloat16", resume=True)


def test_a_replacement_that_fails_replaces_nothing(folder, made, converted):
    edit_tensors(folder, **{key(NORM): np.full(64, np.nan, np.float32)})
    with refused(CheckpointError, NORM):
        convert(folder, made, overwrite=True)
    assert [*everything(made).values()] == [*everything(converted).values()]


def test_sources_that_are_none(folder, made, dst, tmp_path):
    other = tmp_path / "other"
    with refused_whole(tmp_path, UsageError, made, "is a tpjax checkpoint already", "export"):
        convert(made, other)
    with refused_whole(tmp_path, UsageError, "config.json", "only be planned", "--dry-run"):
        convert(folder / "config.json", other)
    with refused_whole(tmp_path, CheckpointError, "'./gone': no such folder"):
        convert("./gone", other)
    for verb in (verify, lambda src: export(src, other)):
        with refused_whole(tmp_path, CheckpointError, folder, f"no {MANIFEST}"):
            verb(folder)


# --- second runs


def test_an_unfinished_conversion_is_not_touched_unasked(folder, dst, tmp_path, monkeypatch):
    begin(folder, dst, monkeypatch)
    with refused_whole(tmp_path, UsageError, partial_of(dst), "--resume", "--overwrite"):
        convert(folder, dst)


def test_resume_and_overwrite(folder, dst, tmp_path):
    with refused_whole(tmp_path, UsageError, "--resume", "--overwrite", "one of them"):
        convert(folder, dst, resume=True, overwrite=True)


@pytest.mark.parametrize("change", ["mtime", "size", "config"])
def test_resuming_with_another_source(folder, dst, tmp_path, monkeypatch, change):
    begin(folder, dst, monkeypatch)
    file = folder / ("config.json" if change == "config" else WEIGHTS)
    if change == "size":
        edit_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)})
    os.utime(file, ns=(5, 5))
    said = (partial_of(dst), "the source has changed", file.name, "--overwrite starts again")
    with refused_whole(tmp_path, CheckpointError, *said):
        convert(folder, dst, resume=True)


@pytest.mark.parametrize("nearly", [False, True], ids=["in the middle", "all but the renaming"])
def test_resuming_with_another_dtype(folder, dst, tmp_path, monkeypatch, nearly):
    if nearly:
        convert(folder, dst)
        dst.rename(partial_of(dst))
    else:
        begin(folder, dst, monkeypatch)
    with refused_whole(tmp_path, UsageError, partial_of(dst), "another dtype", "--overwrite"):
        convert(folder, dst, dtype="bfloat16", resume=True)


@pytest.mark.parametrize("how", HOW)
def test_a_second_converter(folder, dst, tmp_path, how):
    said = (dst, f"another process (number {os.getpid()})", "wait for it")
    with stage(dst), refused_whole(tmp_path, ResourceError, *said):
        convert(folder, dst, **how)


@pytest.mark.parametrize("late", [False, True])
def test_an_unfinished_checkpoint_is_none(folder, dst, tmp_path, monkeypatch, late):
    """Whatever is asked of it, before or after config.json is there."""
    if late:
        write, written = Staging.write, []

        def stop(self, name, content):
            if name == MANIFEST:
                raise RunError("stopped")
            written.append(write(self, name, content))

        with monkeypatch.context() as patch, refused(RunError, "stopped"):
            patch.setattr(Staging, "write", stop)
            convert(folder, dst)
        assert (partial_of(dst) / "config.json").exists()
    else:
        begin(folder, dst, monkeypatch)
    partial = partial_of(dst)
    for verb in (verify, lambda src: export(src, tmp_path / "x")):
        with refused_whole(tmp_path, CheckpointError, partial):
            verb(partial)
    for verb in (inspect, tpjax.LLM):
        with refused_whole(tmp_path, CheckpointError, partial, "unfinished conversion"):
            verb(partial)


# --- disks and memory


def test_no_space_is_told_before_anything_is_written(folder, dst, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    monkeypatch.setattr(os, "pwrite", None)
    with refused_whole(tmp_path, ResourceError, tmp_path, "needs", "0.00 GB are free"):
        convert(folder, dst)


@pytest.mark.parametrize("dst_is_there", [False, True])
@pytest.mark.parametrize(
    "call, after",
    [("write", 0), ("write", 1), ("write", 9), ("pwrite", 0), ("pwrite", 300), ("fsync", 0)]
    + [("fsync", 9), ("fsync", 30), ("mkdir", 0), ("mkdir", 5)],
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
    journal = partial_of(dst) / ".journal"
    assert not partial_of(dst).exists() or len(journal.read_text().splitlines()) > 1
    shutil.rmtree(dst, ignore_errors=True)
    result = convert(folder, dst, resume=True)
    assert (result["converted_now"] < result["weights"]) == (after > 8)
    assert [*everything(dst).values()] == [*everything(converted).values()]


def test_a_disk_that_cannot_be_read(folder, dst, monkeypatch):
    fails(monkeypatch, "preadv", errno.EIO, 6)  # three weights read and read back
    said = ("cannot be read at byte", "Input/output error", "check the disk")
    with refused(CheckpointError, folder / WEIGHTS, *said):
        convert(folder, dst, max_host_gb=0.03)
    assert not dst.exists()


def test_a_source_that_is_cut_while_it_is_read(folder, dst):
    with refused(CheckpointError, folder / WEIGHTS, "ends at byte", "cut while it was read"):
        convert(folder, dst, **ONE_WORKER, on_bytes=lambda n: os.truncate(folder / WEIGHTS, 9000))
    assert not dst.exists()


def test_a_source_that_is_changed_while_it_is_read(folder, dst):
    said = ("has changed while it was converted", "--overwrite")
    with refused(CheckpointError, folder, *said):
        convert(folder, dst, on_bytes=lambda n: os.utime(folder / WEIGHTS, ns=(5, 5)))
    assert not dst.exists()


def test_buffers_too_small_for_a_row(folder, dst, tmp_path):
    """What is said to be enough, is."""
    with refused_whole(tmp_path, UsageError, "--max-host-gb 0.001", "one row of", "at least"):
        convert(folder, dst, max_host_gb=0.001)
    with pytest.raises(UsageError) as caught:
        convert(folder, dst, max_host_gb=0.0005)
    least = float(re.search(r"at least ([\d.]+)", str(caught.value))[1])
    result = convert(folder, dst, max_host_gb=least)
    assert result["buffers_bytes"] <= least * 1e9


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_no_limit_at_all(folder, dst, tmp_path, limit):
    with refused_whole(tmp_path, UsageError, limit):
        convert(folder, dst, max_host_gb=limit)


def test_an_unknown_dtype(folder, dst, tmp_path):
    with refused_whole(tmp_path, UsageError, "dtype='int8'", "bfloat16"):
        convert(folder, dst, dtype="int8")


@pytest.mark.parametrize(
    "verb, code, said",
    [
        ("convert SRC DST --max-host-gb 0", 2, "--max-host-gb 0: give a number above 0"),
        ("convert SRC DST --max-host-gb -1", 2, "--max-host-gb -1"),
        ("convert SRC DST --max-host-gb nan", 2, "--max-host-gb nan"),
        ("convert SRC DST --max-host-gb 0.001", 2, "give at least 0.00"),
        ("convert SRC DST --tensor 0", 2, "= 0: from 1 to "),
        ("convert SRC DST --tensor 3", 2, "the nearest tensor degrees that work are 2 or 4"),
        ("convert SRC DST --resume --overwrite", 2, "one of them"),
        ("convert SRC", 2, "needs DST"),
        ("convert SRC SRC/made", 2, "inside the source"),
        ("convert GONE DST", 3, "no such folder"),
        ("verify SRC", 3, f"no {MANIFEST}"),
        ("verify SRC --tensor 0", 2, "--tensor 0"),
        ("export SRC DST", 3, f"no {MANIFEST}"),
        ("inspect GONE", 3, "no such folder"),
    ],
)
def test_the_command_says_it_in_one_line(folder, dst, tmp_path, capsys, verb, code, said):
    words = verb.replace("SRC", str(folder)).replace("DST", str(dst)).replace("GONE", "./gone")
    before = everything(tmp_path)
    assert main([*words.split(), "--quiet"]) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    assert err.startswith("tpjax-checkpoint: error: ") and said in err
    assert everything(tmp_path) == before


def test_the_command_with_a_full_disk(folder, dst, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        fails(patch, "pwrite", errno.ENOSPC, 0)
        assert main(["convert", str(folder), str(dst), "--quiet"]) == 4
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "no space left" in err
    assert not dst.exists() and not partial_of(dst).exists()


# --- manifests


def sealed(about):
    """Like `Manifest.sealed`, of anything."""
    body = json.dumps({k: v for k, v in about.items() if k != "digest"}, indent=1).encode()[:-2]
    return body + f',\n "digest": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode()


def edit_manifest(folder, change):
    about = json.loads((folder / MANIFEST).read_bytes())
    change(about)
    (folder / MANIFEST).write_bytes(sealed(about))


def quiet_llm(folder):
    return tpjax.LLM(folder, say=lambda line: None)


READERS = [quiet_llm, verify, lambda src: export(src, src.with_name("exported"))]


@pytest.mark.parametrize("reader", READERS, ids=["LLM", "verify", "export"])
def test_a_newer_format(made, tmp_path, reader):
    edit_manifest(made, lambda about: about.update(version=2, weights="of another kind"))
    before = everything(tmp_path)
    with pytest.raises(NewerFormat, match=r"tpjax_manifest.json: of format 2.* upgrade tpjax$"):
        reader(made)
    assert NewerFormat.exit_code == 3 and everything(tmp_path) == before


def test_a_manifest_edited_by_hand(made, tmp_path, capsys):
    """One digit: refused where the checkpoint is used, told where it is looked at."""
    write(made / MANIFEST, lambda raw: raw.replace(b"64", b"65", 1))
    said = (made / MANIFEST, "damaged or edited", "convert the source again")
    for reader in (READERS[0], READERS[2]):
        with refused_whole(tmp_path, CheckpointError, *said):
            reader(made)
    for look in (verify, inspect):
        (problem,) = look(made)["problems"]
        assert all(str(word) in problem for word in said) and len(problem.splitlines()) == 1
    assert main(["verify", str(made), "--quiet"]) == 1
    assert "1 problem(s)" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["source", "copy"])
@pytest.mark.parametrize("to", ["../out", "/out", "a\0b", 5])
def test_an_export_that_would_write_elsewhere(made, tmp_path, where, to):
    """A manifest may come from anywhere, and its digest is no signature."""
    to = f"{tmp_path}/out" if to == "/out" else to

    def change(about):
        first = about["weights"][0]
        moved = first["source"] | {"file": to}
        about.update({"copies": {first["path"]: moved}} if where == "copy" else {})
        first["source"] = first["source"] if where == "copy" else moved

    edit_manifest(made, change)
    with refused_whole(tmp_path, CheckpointError, made):
        export(made, tmp_path / "exported")


def test_names_that_would_write_lines_of_their_own(folder, capsys):
    """Whatever a tensor is called, it stays on its line; and it can be printed."""
    (folder / WEIGHTS).rename(folder / A)
    tensors = load_file(folder / A) | {"a\nproblem: \x1b[2Jb": np.ones(1, np.float32)}
    save_file(tensors, folder / A)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(folder / A), A)}))
    assert main(["inspect", str(folder), "--weights"]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and len(re.findall("^problem:", out, re.M)) == 1
    point(folder, A, "\ud800")
    assert main(["inspect", str(folder)]) == 1
    assert "1 tensor(s) are not in the file" in capsys.readouterr().out


@pytest.mark.parametrize(
    "verify, said", [("full", "needs a tpjax checkpoint"), ("nonsense", "full")]
)
def test_ways_to_verify(folder, made, verify, said):
    with refused(UsageError, f"verify={verify!r}", said):
        tpjax.LLM(folder, verify=verify)
    if verify != "full":
        with refused(UsageError, "verify='nonsense': known are fast, full"):
            tpjax.LLM(made, verify=verify)
