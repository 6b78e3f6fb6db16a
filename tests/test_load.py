"""What lies on every device after loading is exactly what the file holds, each byte read once."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tpjax.checkpoint import folder as folders
from tpjax.checkpoint import load, safetensors
from tpjax.checkpoint.safetensors import SafetensorsFolder
from tpjax.errors import CheckpointError
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan
from tpjax.weights import WeightTable

WEIGHTS = "model.safetensors"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
BITS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
MESHES = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 4)]  # data, tensor


def table_of(folder, data=1, tensor=1, dtype="float32"):
    about = folders.read_folder(folder)
    config = folders.with_dtype(about.config, dtype)
    return WeightTable(config, Plan(mesh=make_mesh(data, tensor)).fit(config)), about.family


def loaded(folder, data=1, tensor=1, dtype="float32"):
    """(path, spec, stored tensor, leaf) of every weight, and the folder they were read from."""
    table, family = table_of(folder, data, tensor, dtype)
    source = SafetensorsFolder(folder)
    leaves = load.load(table, family, source)
    stored = {}
    for file in {info.file for info in source.tensors.values()}:
        stored |= load_file(file)
    tensors = [stored[family.name(spec.path)] for spec in table.specs]
    return list(zip(table.specs, tensors, leaves, strict=True)), source


def padded(spec, tensor):
    """The global array: rows no checkpoint has are zero."""
    grow = [(0, n - m) for n, m in zip(spec.shape, tensor.shape, strict=True)]
    return np.pad(tensor, grow)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def folder(tiny_model):
    """A vocabulary of 131 (padded on every mesh but one), four key/value heads, biases."""
    return tiny_model(num_hidden_layers=1, attention_bias=True, mlp_bias=True)[0]


# --- slices


@pytest.mark.parametrize("data, tensor", MESHES)
def test_every_device_holds_its_slice(folder, data, tensor):
    """Against numpy slicing of the stored tensor, zero rows where the vocabulary is padded. Leaves
    are committed to the table's shardings, so that no step moves a weight."""
    weights, _ = loaded(folder, data, tensor)
    assert any(spec.shape != spec.stored for spec, _, _ in weights) == (tensor > 1)
    for spec, tensor_, leaf in weights:
        assert leaf.committed and leaf.sharding == spec.sharding
        assert (leaf.shape, leaf.dtype) == (spec.shape, spec.dtype)
        assert len(leaf.addressable_shards) == data * tensor
        whole = padded(spec, tensor_)
        for shard in leaf.addressable_shards:
            assert same_bits(np.asarray(shard.data), whole[shard.index]), (spec.path, shard.device)


@pytest.mark.parametrize("data, tensor", MESHES)
def test_every_byte_is_read_once(folder, data, tensor, monkeypatch):
    """One read per distinct slice, so a split weight is read once in total, a replicated one once,
    and key/value heads that several devices share once per head."""
    reads = Counter()
    parts = SafetensorsFolder.parts

    def counted(self, name, bounds, out):
        reads[name] += 1
        return parts(self, name, bounds, out)

    monkeypatch.setattr(SafetensorsFolder, "parts", counted)
    weights, source = loaded(folder, data, tensor)
    assert source.bytes_read == sum(stored.nbytes for _, stored, _ in weights)
    pieces = Counter()
    for spec, _, leaf in weights:
        slices = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        assert sum(slices.values()) == spec.bytes
        pieces[len(slices)] += 1
    assert sorted(reads.values()) == sorted(pieces.elements())
    assert reads["model.layers.0.self_attn.q_proj.weight"] == tensor
    assert reads["model.layers.0.self_attn.k_proj.weight"] == min(tensor, 4)
    assert reads["model.layers.0.mlp.down_proj.weight"] == tensor
    assert reads["model.layers.0.mlp.down_proj.bias"] == 1
    assert reads["model.norm.weight"] == 1
    assert reads["lm_head.weight"] == tensor


def test_shared_key_value_heads(folder):
    """Four heads on eight devices: device r of a pair holds the same head as its neighbour, and
    device pair t holds rows 8 t to 8 t + 7 of the projection."""
    weights, _ = loaded(folder, tensor=8)
    (stored, leaf) = next((t, x) for spec, t, x in weights if spec.path == "blocks.0.attn.k.w")
    shards = {shard.device.id: np.asarray(shard.data) for shard in leaf.addressable_shards}
    for device, rows in shards.items():
        head = device // 2
        assert same_bits(rows, stored[8 * head : 8 * head + 8])


@pytest.mark.parametrize("vocab", [1, 5, 9])
def test_a_vocabulary_smaller_than_the_padding(tiny_model, vocab):
    """Devices whose whole slice is padding hold zeros."""
    folder, _ = tiny_model(num_hidden_layers=1, vocab_size=vocab, pad_token_id=None)
    weights, source = loaded(folder, tensor=8)
    for spec, tensor, leaf in weights:
        assert same_bits(np.asarray(leaf), padded(spec, tensor)), spec.path
    assert source.bytes_read == sum(tensor.nbytes for _, tensor, _ in weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_stored_and_wanted_dtypes(folder, tmp_path, stored, dtype):
    """Every pair: the shards are the stored tensor's, cast; bytes are counted as stored."""
    copy = shutil.copytree(folder, tmp_path / "m")
    tensors = {k: v.astype(DTYPES[stored]) for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, copy / WEIGHTS)
    weights, source = loaded(copy, tensor=2, dtype=dtype)
    assert source.bytes_read == sum(t.nbytes for t in tensors.values())
    for spec, tensor, leaf in weights:
        assert tensor.dtype == DTYPES[stored] and spec.dtype == DTYPES[dtype]
        assert same_bits(np.asarray(leaf), padded(spec, tensor).astype(DTYPES[dtype])), spec.path


@pytest.mark.parametrize("chunk", [1, 100, 1000])
@pytest.mark.parametrize("data, tensor", [(1, 1), (2, 4)])
def test_a_few_rows_at_a_time(folder, data, tensor, chunk, monkeypatch):
    """However few rows are read together, leaves and bytes read are the same."""
    monkeypatch.setattr(safetensors, "CHUNK", chunk)
    weights, source = loaded(folder, data, tensor)
    assert source.bytes_read == sum(stored.nbytes for _, stored, _ in weights)
    for spec, stored, leaf in weights:
        assert same_bits(np.asarray(leaf), padded(spec, stored)), spec.path


@pytest.mark.parametrize("row", [0, 1, 70, 130])
def test_a_nan_in_any_row_is_found(folder, tmp_path, row, monkeypatch):
    """Each chunk of rows is looked at, the last one too."""
    monkeypatch.setattr(safetensors, "CHUNK", 128)
    copy = shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"][row, 63] = np.nan
    save_file(tensors, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match="lm_head.weight holds a NaN"):
        loaded(copy, tensor=4)


# --- which files, which tensors


def leaves(folder, **sizes):
    return [np.asarray(leaf) for _, _, leaf in loaded(folder, **sizes)[0]]


def assert_equal(some, others):
    assert len(some) == len(others)
    assert all(same_bits(a, b) for a, b in zip(some, others, strict=True))


def test_single_and_sharded_checkpoints_are_the_same(tiny_model, tmp_path):
    """Sharded by transformers itself, into many files."""
    folder, model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and not (tmp_path / WEIGHTS).exists()
    assert_equal(leaves(folder, tensor=4), leaves(tmp_path, tensor=4))


def test_linked_files_load(folder, tmp_path):
    """Hub caches keep files elsewhere and link to them; that is not pointing outside."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert_equal(leaves(folder), leaves(tmp_path))


def test_frequencies_in_old_checkpoints_are_ignored(folder, tmp_path):
    """Llama 1 and 2 files hold rotary frequencies, which the config says too."""
    copy = shutil.copytree(folder, tmp_path / "m")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float64)}
    save_file(load_file(folder / WEIGHTS) | extra, copy / WEIGHTS)
    assert_equal(leaves(folder), leaves(copy))


@pytest.mark.parametrize("copied", [False, True])
def test_tied_embeddings(tiny_model, tmp_path, copied):
    """With and without the tied copy that some files hold: one leaf, the embedding."""
    folder, _ = tiny_model(num_hidden_layers=1, tie_word_embeddings=True)
    tensors = load_file(folder / WEIGHTS)
    assert "lm_head.weight" not in tensors
    if copied:
        embedding = tensors["model.embed_tokens.weight"]
        copy = shutil.copytree(folder, tmp_path / "m")
        save_file(tensors | {"lm_head.weight": embedding.copy()}, copy / WEIGHTS)
        folder = copy
    weights, source = loaded(folder, tensor=2)
    assert "head" not in {spec.path for spec, _, _ in weights}
    compared = 2 * tensors["model.embed_tokens.weight"].nbytes if copied else 0
    assert source.bytes_read == sum(t.nbytes for t in tensors.values()) + compared


def test_a_tied_copy_that_is_none(tiny_model, tmp_path):
    """transformers would not tie here; what it would compute is not what one leaf can."""
    folder, _ = tiny_model(num_hidden_layers=1, tie_word_embeddings=True)
    copy = shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / WEIGHTS)
    other = tensors["model.embed_tokens.weight"].copy()
    other[130, 63] += 1
    save_file(tensors | {"lm_head.weight": other}, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match="lm_head.weight is model.embed_tokens.weight"):
        loaded(copy, tensor=2)


def test_progress_sees_every_weight_once(folder):
    table, family = table_of(folder)
    seen = []

    def progress(specs):
        for spec in specs:
            seen.append(spec.path)
            yield spec

    load.load(table, family, SafetensorsFolder(folder), progress)
    assert seen == [spec.path for spec in table.specs]


# --- casting and checking


def every_16_bits(dtype):
    return np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype])


def edges_of_float32():
    """Every upper half with the lower halves around which rounding to bfloat16 or float16 turns."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (upper[:, None] | lower[None, :]).reshape(-1).view(np.float32)


def patterns(dtype):
    return edges_of_float32() if dtype == "float32" else every_16_bits(dtype)


def numpy_cast(x, dtype):
    with np.errstate(over="ignore"):
        return x.astype(DTYPES[dtype])


def cast(x, dtype):
    out = np.empty(x.shape, DTYPES[dtype])
    load.cast_into(out, x)
    return out


def is_nan(x):
    with np.errstate(invalid="ignore"):  # what ml_dtypes says of a signalling NaN
        return np.isnan(x)


def is_finite(x):
    with np.errstate(invalid="ignore"):
        return np.isfinite(x)


@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_cast_is_round_to_nearest_even(stored, wanted):
    """Bit for bit what numpy and ml_dtypes give, and what torch gives, for all 16-bit patterns and
    for every float32 near a tie."""
    x = patterns(stored)
    x = x[~is_nan(x)]
    got = cast(x, wanted)
    assert same_bits(got, numpy_cast(x, wanted))
    bits = {"float32": torch.int32, "bfloat16": torch.int16, "float16": torch.int16}
    signed = x.view(BITS[stored]).view(f"i{x.itemsize}").copy()
    theirs = torch.from_numpy(signed).view(getattr(torch, stored)).to(getattr(torch, wanted))
    assert got.tobytes() == theirs.view(bits[wanted]).numpy().tobytes()


def raw(dtype):
    """Arrays of raw bit patterns, each bit of each number arbitrary."""
    width = 32 if dtype == "float32" else 16
    numbers = st.lists(st.integers(0, 2**width - 1), min_size=1, max_size=40)
    return numbers.map(lambda n: np.array(n, BITS[dtype]).view(DTYPES[dtype]))


@pytest.mark.parametrize("stored, wanted", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_cast_of_any_bits(stored, wanted):
    @settings(max_examples=150, deadline=None)
    @given(raw(stored))
    def check(x):
        x = x[~is_nan(x)].reshape(-1, 1)
        assert same_bits(cast(x, wanted), numpy_cast(x, wanted))

    check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cast_keeps_not_a_number(dtype):
    """The check may look at the cast weight, so a cast must never hide a NaN."""
    for stored in DTYPES:
        x = patterns(stored)
        x = x[is_nan(x)]
        assert len(x) and is_nan(cast(x, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_finite_of_each_number(dtype):
    """Every 16-bit number alone, and float32 numbers of every exponent."""
    x = patterns(dtype)
    if dtype == "float32":
        x = np.concatenate([x[:: 9 * 16], np.array([np.inf, -np.inf, np.nan, -0.0], x.dtype)])
    told = [load.all_finite(x[i : i + 1]) for i in range(len(x))]
    assert told == is_finite(x).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_finite_of_any_bits(dtype):
    """Whatever the shape and the strides."""

    @settings(max_examples=150, deadline=None)
    @given(raw(dtype))
    def check(x):
        expected = bool(is_finite(x).all())
        assert load.all_finite(x) is expected
        assert load.all_finite(x.reshape(-1, 1)) is expected
        assert load.all_finite(np.stack([x, x], axis=-1)[:, 1]) is expected

    check()
    assert load.all_finite(np.zeros((0, 3), DTYPES[dtype]))


# --- random weights


@pytest.mark.parametrize("data, tensor, dtype", [(1, 1, "bfloat16"), (2, 4, "float32")])
def test_random_weights(folder, data, tensor, dtype):
    """Shapes, dtypes and shardings of the table; finite, of unit scale after a product, the same
    for the same seed and different for another."""
    table, _ = table_of(folder, data, tensor, dtype)
    one, same, other = (load.random(table, seed) for seed in (1, 1, 2))
    for spec, x, y, z in zip(table.specs, one, same, other, strict=True):
        assert (x.shape, x.dtype, x.sharding) == (spec.shape, spec.dtype, spec.sharding)
        assert x.committed
        x, y, z = (np.asarray(a).astype(np.float32) for a in (x, y, z))
        assert np.isfinite(x).all() and (x == y).all()
        if x.ndim == 2:
            assert (x != z).any()
            assert 0.8 < x.std() * math.sqrt(x.shape[1]) < 1.2
        else:
            assert (x == 1).all()
    assert len(one) == len(table.specs) and all(isinstance(x, jax.Array) for x in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stored, dtype",
    [
        ("bfloat16", "float32"),
        pytest.param("bfloat16", "bfloat16", marks=pytest.mark.extra),
    ],
)
def test_loading_takes_little_more_memory_than_the_weights(stored, dtype):
    """A checkpoint of 1.03 GB at tensor=4, the largest weight a quarter of it: less than 300 MB
    beyond the weights themselves."""
    words = ["-m", "tpjax.bench.load_memory", "-tp", "4", "--stored", stored, "--dtype", dtype]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["weights_bytes"] > 1e9
    assert result["beyond_weights_bytes"] < 300e6, result


def test_whole_rows_are_read_to_where_they_belong(folder):
    """Column slices, and what is cast, come from the file's pages."""
    source = SafetensorsFolder(folder)
    name = next(n for n, info in source.tensors.items() if len(info.shape) == 2)
    rows, columns = source.tensors[name].shape
    stored = source.read(name, (slice(None),))
    for bounds, dtype, straight in (
        (((1, rows - 1), (0, columns)), np.float32, True),
        (((1, rows - 1), (0, columns // 2)), np.float32, False),
        (((1, rows - 1), (0, columns)), np.float16, False),
    ):
        out = np.zeros([b - a for a, b in bounds], dtype)
        parts = list(source.parts(name, bounds, out))
        assert all((part is None) == straight for _, part in parts)
        found = out if straight else np.concatenate([part for _, part in parts])
        assert (found == stored[1 : rows - 1, : bounds[1][1]]).all()


def test_a_file_cut_while_it_is_read(folder, tmp_path):
    """Is told, where its pages would end the process."""
    shutil.copytree(folder, tmp_path / "cut")
    source = SafetensorsFolder(tmp_path / "cut")
    name, info = max(source.tensors.items(), key=lambda item: item[1].offset)
    os.truncate(info.file, info.offset + 4)
    out = np.zeros(info.shape, np.float32)
    with pytest.raises(CheckpointError, match="ends at byte .* changed or cut while it was read"):
        list(source.parts(name, tuple((0, n) for n in info.shape), out))
