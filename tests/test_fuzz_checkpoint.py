"""Checkpoint files damaged at random, or made to harm: each is read, or refused in one line.

Whatever they hold: no other exception, nothing hangs, no file outside the folder is opened, nothing
beyond a file's end is read, and what is read is what the safetensors library reads.
"""

import builtins
import copy
import io
import json
import math
import os
import shutil
import signal
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from checkpoints_tools.convert import convert
from checkpoints_tools.sources import hugging_face
from tests.bad import INDEX, WEIGHTS
from tpjax.checkpoint import safetensors
from tpjax.checkpoint.layout import NUMPY
from tpjax.checkpoint.manifest import MANIFEST
from tpjax.checkpoint.orbax import OrbaxFolder
from tpjax.checkpoint.safetensors import READABLE
from tpjax.errors import CheckpointError

SECONDS = 5  # a case takes milliseconds; a hang would take for ever
SMALL = 1 << 20


def cases(number, *strategies):
    """Run the function below on so many cases, at once."""

    def run(function):
        slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        limits = settings(max_examples=number, deadline=None, suppress_health_check=slow)
        limits(given(*strategies)(function))()

    return run


# --- what every case must keep to


class Watch:
    """What was opened and read, and how it ended."""

    def __init__(self, folder: Path):
        self.folder, self.outside, self.beyond = folder, [], []
        self.ends: Counter = Counter()

    def opening(self, path) -> None:
        # Links are the test's own; whatever else is opened must lie in the folder, by its name and
        # in fact.
        with suppress(ValueError, TypeError):  # no name of a file at all
            name = Path(os.path.abspath(os.fsdecode(path)))
            assert not name.is_fifo(), "opens a pipe"
            inside = name.is_relative_to(self.folder)
            if not inside or not (name.is_symlink() or name.resolve() == name):
                self.outside.append(path)

    @contextmanager
    def patched(self):
        def wrapped(real):
            def call(path, *args, **kwargs):
                self.opening(path)
                return real(path, *args, **kwargs)

            return call

        real = os.preadv

        def preadv(fd, buffers, offset):
            if offset < 0 or offset + sum(map(len, buffers)) > os.fstat(fd).st_size:
                self.beyond.append(offset)
            return real(fd, buffers, offset)

        def hang(*_):
            raise AssertionError(f"hangs: {SECONDS} seconds")

        before = signal.signal(signal.SIGALRM, hang)
        with pytest.MonkeyPatch.context() as patch:
            for module, name in ((builtins, "open"), (io, "open"), (os, "open")):
                patch.setattr(module, name, wrapped(getattr(module, name)))
            patch.setattr(safetensors, "safe_open", wrapped(safetensors.safe_open))
            patch.setattr(os, "preadv", preadv)
            signal.alarm(SECONDS)
            try:
                yield
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)

    def holds(self, read) -> None:
        """One case: ``read(folder)`` works, or is refused in one line."""
        self.outside.clear()
        self.beyond.clear()
        end = "read"
        with self.patched():
            try:
                read(self.folder)
            except CheckpointError as error:
                end = "refused"
                assert one_line(str(error)), error
        assert not self.outside
        assert end == "refused" or not self.beyond
        self.ends[end] += 1

    def both(self) -> bool:
        """Whether a good part of the cases ended in either way: else they show nothing."""
        return min(self.ends["read"], self.ends["refused"]) > 15


def one_line(text: str) -> bool:
    return len(text.splitlines()) == 1


@pytest.fixture
def watch(tmp_path):
    (tmp_path / "model").mkdir()
    return Watch(tmp_path.resolve() / "model")


def read_rows(folder):
    """Every small tensor, as the converter reads it and as the library does."""
    source = hugging_face(folder)
    for name, info in source.tensors.items():
        size = os.path.getsize(info.file)
        assert 8 <= info.offset <= size
        nbytes = math.prod(info.shape) * NUMPY[READABLE.get(info.dtype, "float16")].itemsize
        if info.dtype not in READABLE or not 0 < nbytes < SMALL:
            continue
        assert info.offset + nbytes <= size
        count = info.shape[0] if info.shape else 1
        rows = np.empty((count, nbytes // count), np.uint8)
        with source.rows(name) as read:
            read(0, rows)
        if info.shape:
            whole = source.read(name, (slice(None),) * len(info.shape))
            assert rows.tobytes() == whole.tobytes()


def read_checkpoint(folder):
    """What a start does: everything is looked at that is not a weight, and a sample of those."""
    source = OrbaxFolder(folder, verify=None)
    problems = list(source.check())
    assert all(one_line(problem) for problem in problems), problems
    if problems:
        raise CheckpointError(problems[0])
    for weight in source.weights.values():
        bounds = tuple((0, size) for size in weight.shape)
        assert all(part is not None for _, part in source.parts(weight.path, bounds, np.empty(0)))


# --- damage

NAMES = ["", ".", "..", "../secret.safetensors", "/etc/passwd", "x" * 5000, "a\0b", "\ud800"]
NAMES += ["a\nb", "a\x1b[2J", "sub", "fifo", "link", "loop", "dead", "sub/inner.safetensors"]
NAMES += ["a.safetensors", "./a.safetensors", "b.safetensors", "sub/../a.safetensors"]
NAMES += ["config.json", "gone.safetensors", "weights"]
NUMBERS = [-1, 0, 1, 2, 3, 64, 1.0, 0.5, 1e400, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30]
WORDS = ["F32", "F64", "I8", "BF16", "F4", "float32", "int8", "@nested", "@digits", "@latin"]
junk = st.one_of(
    st.sampled_from([None, True, math.nan, [], {}, [[]], [1], {"a": 1}, [0, 4], [2**63, 2**64]]),
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from(NAMES),
    st.integers(),
    st.text(max_size=9),
)


def text(value) -> bytes:
    """JSON, with what json.dumps does not write."""
    raw = json.dumps(value, indent=1).encode()
    for word, is_ in (("@nested", b"[" * 3000 + b"]" * 3000), ("@digits", b"9" * 5000)):
        raw = raw.replace(f'"{word}"'.encode(), is_)
    return raw.replace(b"@latin", b"\xff\xfe")


@st.composite
def spoiled(draw, value):
    """A JSON value with a few of its parts replaced, removed, renamed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        value = _spoil(draw, value)
    return value


def _spoil(draw, value):
    if isinstance(value, dict | list) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        how = draw(st.sampled_from(["deeper"] * 8 + ["remove", "rename", "repeat"]))
        part = value[key] if how == "deeper" else value.pop(key)
        if how == "deeper":
            value[key] = _spoil(draw, part)
        elif how != "remove" and isinstance(value, dict):
            value[draw(st.sampled_from(NAMES) | st.text(max_size=9))] = part
        elif how != "remove":
            value += [part, copy.deepcopy(part)]
        return value
    if isinstance(value, int) and draw(st.booleans()):
        near = [value + 1, value - 1, value * 2, -value, float(value), str(value), [value]]
        return draw(st.sampled_from(near))
    return copy.deepcopy(draw(junk))


@st.composite
def damaged(draw, raw, head):
    """Bytes flipped, inserted, removed or cut off, mostly in the first ``head``."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 2))):
        first, last = draw(st.sampled_from([(0, 8), (0, head), (head, len(raw))]))
        at = draw(st.integers(first, last))
        new = draw(st.binary(max_size=4) | st.sampled_from([b"9", b"0", b"-", b"e9", b'"', b"["]))
        old = draw(st.sampled_from([len(new)] * 4 + [0, 1, 4]))
        data[at : at + old] = new
    whole = draw(st.integers(0, 9))
    return bytes(data if whole else data[: draw(st.integers(0, len(raw)))])


# --- safetensors

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
    "c": np.arange(5, dtype=np.float16),
    "d": np.arange(4, dtype=np.int64),
}
FILE = save(TENSORS)
HEAD = 8 + int.from_bytes(FILE[:8], "little")
HEADER = json.loads(FILE[8:HEAD])
tensor = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I8", "BOOL", "F4", "F8_E8M0"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 4, 2**32, 2**63]), max_size=4),
        "data_offsets": st.lists(st.integers(0, 80), min_size=2, max_size=2).map(sorted),
    }
)


def test_a_file_with_bytes_changed(watch):
    @cases(500, damaged(FILE, HEAD))
    def case(raw):
        (watch.folder / WEIGHTS).write_bytes(raw)
        watch.holds(read_rows)

    assert watch.both()


def test_a_file_with_any_length_of_header(watch):
    lengths = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2 * len(FILE)))

    @cases(150, lengths)
    def case(length):
        (watch.folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + FILE[8:])
        watch.holds(read_rows)


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + FILE[HEAD:]


def test_a_file_with_a_spoiled_header(watch):
    @cases(400, spoiled(HEADER))
    def case(header):
        (watch.folder / WEIGHTS).write_bytes(with_header(text(header)))
        watch.holds(read_rows)

    assert watch.ends["refused"] > 15


def test_a_file_with_a_header_made_up(watch):
    """Pairs, so that names are repeated; tensors that follow each other, so that some are right."""

    @st.composite
    def headers(draw):
        pairs, at = [], 0
        for name in draw(st.lists(st.sampled_from(["a", "b", "c", "__metadata__"]), max_size=5)):
            about = draw(tensor)
            if draw(st.integers(0, 3)):
                about |= {"dtype": "F32", "shape": [2, draw(st.integers(0, 3))]}
                about["data_offsets"] = [at, at := at + 4 * math.prod(about["shape"])]
            pairs.append(f"{json.dumps(name)}:{text(about).decode()}")
            if draw(st.integers(0, 9)) == 0:
                pairs[-1] = pairs[-1][:-1] + ', "more": ' + text(draw(junk)).decode("latin-1") + "}"
        return ("{" + ",".join(pairs) + "}").encode(), at

    @cases(400, headers())
    def case(made):
        header, size = made
        (watch.folder / WEIGHTS).write_bytes(with_header(header)[: 8 + len(header)] + bytes(size))
        watch.holds(read_rows)

    assert watch.both()


# --- the index


def test_an_index_of_any_content(watch):
    """Names that lead out, to folders, pipes, links, nowhere."""
    folder = watch.folder
    (folder / "sub").mkdir()
    (folder / "config.json").write_text("{}")
    for file, names in {"a": "ad", "b": "c", "sub/inner": "ab", "../secret": "ac"}.items():
        tensors = {name: TENSORS[name if name != "b" else "b.weight"] for name in names}
        save_file(tensors, folder / f"{file}.safetensors")
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to(folder.parent / "secret.safetensors")
    (folder / "loop").symlink_to("loop")
    (folder / "dead").symlink_to("nowhere")
    names = st.sampled_from([*NAMES, str(folder / "a.safetensors")]) | st.text(max_size=5)
    keys = st.sampled_from(["a", "b", "c", "d"]) | st.text(max_size=5)
    right = {"metadata": {}, "weight_map": {"a": "a.safetensors", "c": "b.safetensors"}}
    index = st.one_of(
        spoiled(right).map(text),
        st.dictionaries(keys, names, max_size=3).map(lambda where: text({"weight_map": where})),
        junk.map(text),
        damaged(text(right), len(text(right))),
    )

    @cases(500, index)
    def case(raw):
        (folder / INDEX).write_bytes(raw)
        watch.holds(read_rows)

    assert watch.both()


# --- the manifest

CUT_IN_COLUMNS = "blocks.0.attn.o.w"


@pytest.fixture
def made(tiny_model, watch):
    """A checkpoint of two weights in the watched folder, and what its manifest says."""
    source, _ = tiny_model(num_hidden_layers=1, vocab_size=16, hidden_size=16)
    watch.folder.rmdir()
    convert(source, watch.folder)
    os.mkfifo(watch.folder / "fifo")
    raw = (watch.folder / MANIFEST).read_bytes()
    about = json.loads(raw)
    del about["digest"]
    assert sealed(text(about)) == raw
    about["weights"] = [w for w in about["weights"] if w["path"] in ("norm.w", CUT_IN_COLUMNS)]
    about["files"] = {name: about["files"][name] for name in ("config.json", "weights/_METADATA")}
    (watch.folder / MANIFEST).write_bytes(sealed(text(about)))
    read_checkpoint(watch.folder)
    return watch, about


def sealed(raw: bytes) -> bytes:
    """Like `Manifest.sealed`, of anything."""
    body = raw.rstrip()[:-1].rstrip()
    return body + f',\n "digest": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'.encode()


def test_a_manifest_with_bytes_changed(made):
    watch, about = made
    raw = sealed(text(about))

    @cases(250, damaged(raw, len(raw)), st.booleans())
    def case(raw, seal):
        (watch.folder / MANIFEST).write_bytes(sealed(raw) if seal else raw)
        watch.holds(read_checkpoint)


def test_a_manifest_with_any_content_and_the_right_digest(made):
    watch, about = made

    @cases(500, spoiled(about))
    def case(about):
        (watch.folder / MANIFEST).write_bytes(sealed(text(about)))
        watch.holds(read_checkpoint)

    assert watch.both()


@st.composite
def geometries(draw, weight):
    """Another shape and cut of a weight, with as many digests as it then has chunks; or the same,
    in numbers of another kind."""
    odd = st.sampled_from([1, 2, 3, 2**31, 2**40, 2**62, 2**63, 10**30, 1.0, 2.0, 0.5, 1e400, True])
    same = [*weight["shape"], *weight["cut"]]
    kind = st.sampled_from([lambda size: size] * 3 + [float, lambda size: draw(odd)])
    *shape, axis, width = (draw(kind)(size) for size in same)
    made = weight | {"shape": shape, "cut": [axis, width]}
    with suppress(ArithmeticError, ValueError, TypeError, LookupError):
        count = -(-shape[axis] // width)
        if 0 <= count < 200:
            made["chunks"] = (weight["chunks"] * 200)[: 16 * int(count)]
    return made | {"dtype": draw(st.sampled_from(["float32", "float32", "bfloat16"]))}


def test_a_manifest_of_weights_and_files_that_cannot_be(made):
    """Among them weights and files that are there, but outside the folder."""
    watch, about = made
    shutil.copytree(watch.folder / "weights" / "norm.w", watch.folder.parent / "norm.w")
    shutil.copy(watch.folder / "config.json", watch.folder.parent / "secret.safetensors")
    one, other = about["weights"]
    paths = st.sampled_from(["../../norm.w", "a/../../../norm.w", *NAMES])
    weight = st.one_of(
        spoiled(one),
        geometries(one),
        geometries(other),
        paths.map(lambda path: other | {"path": path}),
    )
    info = st.just(about["files"]["config.json"])
    files = st.dictionaries(st.sampled_from(NAMES), info, min_size=1, max_size=2)
    changes = st.one_of(
        weight.map(lambda made: {"weights": [made]}), files.map(lambda made: {"files": made})
    )

    @cases(500, changes)
    def case(changes):
        (watch.folder / MANIFEST).write_bytes(sealed(text(about | changes)))
        watch.holds(read_checkpoint)

    assert watch.both()


@pytest.mark.parametrize("file", [WEIGHTS, INDEX, "shard", "config.json", "data"])
def test_a_pipe_in_the_place_of_a_file(made, file):
    """Opening one waits for a writer, for ever."""
    watch, _ = made
    path = watch.folder / {"shard": "fifo", "data": "weights/norm.w/c/0"}.get(file, file)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    if file == "shard":
        (watch.folder / INDEX).write_bytes(text({"weight_map": {"a": "fifo"}}))
    watch.holds(read_checkpoint if file in ("config.json", "data") else read_rows)
    assert watch.ends["refused"]
