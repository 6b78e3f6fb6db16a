"""Memory for weights: got ahead, taken by the room, given back where it is not needed."""

import argparse
import json
import os
import threading
import time

import numpy as np
import psutil
import pytest

from tests.test_cli import main
from tpjax import generate, host
from tpjax.checkpoint import room
from tpjax.checkpoint.files import held_bytes
from tpjax.checkpoint.folder import bundled
from tpjax.checkpoint.room import Room
from tpjax.engine.memory import free
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan

MIB = 1 << 20
BYTES = np.dtype(np.uint8)


@pytest.fixture
def worth_it(monkeypatch):
    monkeypatch.setattr(room, "_WORTH_IT", 1)


def resident() -> int:
    return psutil.Process().memory_info().rss


def wait_for(size: int) -> None:
    for _ in range(1000):
        if room.got_ahead() >= size:
            return
        time.sleep(0.01)
    raise AssertionError(f"{room.got_ahead()} bytes, not {size}")


def address(memory: Room) -> int:
    return memory._bytes.ctypes.data


def test_a_room_takes_what_was_got_ahead(worth_it):
    """All of it zeros, in the pages that are there; threads have ended before it is used."""
    before = threading.active_count()
    with room.ahead(192 * MIB):
        wait_for(192 * MIB)
        pages = room._ahead._bytes.ctypes.data
        held = resident()
        memory = Room([96 * MIB, 90 * MIB])
        assert address(memory) == pages and room.got_ahead() == 0
        assert threading.active_count() == before
        arrays = [memory.empty((size * MIB,), BYTES) for size in (96, 90)]
        for array in arrays:
            array[:] = 7
        assert resident() - held < 32 * MIB  # no other pages
    assert all((array == 7).all() for array in arrays)
    assert not Room([MIB]).empty((MIB,), BYTES).any()


def test_what_a_room_does_not_need_is_given_back(worth_it):
    with room.ahead(256 * MIB):
        wait_for(256 * MIB)
        held = resident()
        memory = Room([32 * MIB])
        assert held - resident() > 200 * MIB
        assert not memory.empty((32 * MIB,), BYTES).any()


@pytest.mark.parametrize("sizes", [None, [300 * MIB]])
def test_what_no_room_takes_is_given_back(worth_it, sizes):
    """Because there is none, as after an error, or a larger one."""
    before = resident()
    with pytest.raises(KeyError), room.ahead(128 * MIB):
        wait_for(128 * MIB)
        pages = room._ahead._bytes.ctypes.data
        if sizes:
            assert address(Room(sizes)) != pages
        raise KeyError
    assert resident() - before < 64 * MIB and room.got_ahead() == 0


def test_threads_stop_when_they_are_told(worth_it, monkeypatch):
    """At the next piece, not at the end."""
    monkeypatch.setattr(room, "_PIECE", 1 << 12)
    before = threading.active_count()
    with room.ahead(512 * MIB):
        got = room._ahead
        Room([MIB])
        assert got.bytes < 512 * MIB and threading.active_count() == before


def test_what_is_got_ahead_counts_as_free(worth_it, monkeypatch):
    plan = Plan(mesh=make_mesh(tensor=2))
    monkeypatch.setattr(host, "free_memory", lambda: 1000 * MIB)
    assert free(plan) == 500 * MIB
    with room.ahead(128 * MIB):
        wait_for(128 * MIB)
        assert free(plan) == 564 * MIB


@pytest.mark.parametrize("size, available", [(0, 8 << 30), (300 * MIB, 599 * MIB)])
def test_nothing_is_got_of_what_is_little_or_half_of_all(monkeypatch, size, available):
    monkeypatch.setattr(host, "free_memory", lambda: available)
    with room.ahead(size):
        assert room._ahead is None


def test_generate_gets_it_ahead(worth_it, monkeypatch, capsys):
    """And makes the same text as without; a folder that is none gets nothing."""
    taken, got, said = [], room._got, []
    monkeypatch.setattr(
        room, "_got", lambda total: [taken.append(room._ahead is not None), got(total)][1]
    )
    words = ("generate", "--prompt", "a", "--max-tokens", "2", "--quiet", "-tp", "1")
    for given, code, ahead in (
        (("--model", str(bundled())), 0, True),
        ((), 0, False),
        (("--model", "/no/such/folder"), 3, False),
    ):
        taken.clear()
        found, out, _ = main(capsys, *words, *given)
        said.append(out)
        assert found == code and taken[0] == ahead and not any(taken[1:])
    assert said[0] == said[1] != ""


@pytest.mark.parametrize(
    "stored, dtype, times",
    [
        ("BF16", "auto", 1),
        ("BF16", "bfloat16", 1),
        ("F16", "auto", 2),
        ("F16", "bfloat16", 1),
        ("F32", "auto", 1),
        ("F32", "bfloat16", 0.5),
    ],
)
def test_what_will_be_held(tmp_path, stored, dtype, times):
    """By the index, where files lie about that are not of this model; else by the only file."""
    header = json.dumps({"__metadata__": {}, "x": {"dtype": stored}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(1000)
    for name in ("model.safetensors", "a.safetensors", "b.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(content)
    assert held_bytes(tmp_path, dtype) == times * len(content) // 1
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert held_bytes(tmp_path, dtype) == times * 2 * len(content)
    # What cannot be told is said by whoever loads it.
    args = argparse.Namespace(devices=1, model=str(tmp_path), dtype=dtype)
    assert generate._held_bytes(args) == times * 2 * len(content)
    os.mkfifo(tmp_path / "pipe.safetensors")  # nobody will ever write to it
    named = [json.dumps({"weight_map": {"x": f"{n}.safetensors"}}) for n in ("c", "pipe")]
    for wrong in ("{}", "[1]", "{", '{"weight_map": {"x": 5}}', *named):
        (tmp_path / "model.safetensors.index.json").write_text(wrong)
        assert generate._held_bytes(args) == 0
