"""`tpjax bench decode --sweep`: what is asked for, the fit, the picture."""

import argparse
import functools
import json
from dataclasses import replace

import pytest

from tests.test_cli import main
from tpjax.audit.program import collectives
from tpjax.bench import sweep
from tpjax.bench.sweep import Point, fitted, points
from tpjax.cache import KVCache
from tpjax.checkpoint.folder import bundled
from tpjax.engine.llm import LLM
from tpjax.errors import UsageError


def asked(sweep: str, **words) -> list[Point]:
    usual = dict(sweep=sweep, tensor_parallel_size=None, data_parallel_size=None, batch=3)
    return points(argparse.Namespace(**usual | dict(prompt_length=9, max_tokens=6) | words))


def test_all_combinations_of_what_is_asked():
    assert asked("tensor=4/1,context=64") == [Point(1, 3, 64), Point(4, 3, 64)]
    assert [p.batch for p in asked("batch")] == [1, 2, 4, 8, 16, 32]
    assert asked("batch=2/1", tensor_parallel_size=2) == [Point(2, 1, 15), Point(2, 2, 15)]


@pytest.mark.parametrize(
    "sweep, said",
    [
        ("rows", "--sweep rows: known are tensor, batch, context"),
        ("batch=a", "write batch=1/2/4"),
        ("batch=0", "0 is too small"),
        ("context=4/64", "4 is too small"),
    ],
)
def test_what_cannot_be_swept(sweep, said):
    with pytest.raises(UsageError, match=said):
        asked(sweep)


def test_the_fit_finds_what_steps_cost():
    """Each degree has its own numbers; a step beside the line does not move the others far."""
    cost = {1: (0.05, 0.004, 2e-6), 2: (0.03, 0.001, 1e-6)}
    at = [Point(t, b, c) for t in cost for b in (1, 4, 16) for c in (128, 1024, 8192)]
    true = {
        p: cost[p.tensor][0] + p.batch * (cost[p.tensor][1] + p.context * cost[p.tensor][2])
        for p in at
    }
    fit = fitted(true)
    assert all(abs(fit[p] / true[p] - 1) < 1e-6 for p in at)
    slow = at[4]
    fit = fitted(true | {slow: 1.3 * true[slow]})
    assert 1.15 < 1.3 * true[slow] / fit[slow] < 1.3


def test_a_sweep_of_the_bundled_model(capsys, tmp_path):
    picture = tmp_path / "sweep.png"
    words = (
        "bench",
        "decode",
        "-tp",
        "2",
        "--sweep",
        "batch=1/2,context=32/64",
        "--json",
        "--quiet",
    )
    code, out, _ = main(capsys, *words, "--plot", str(picture))
    assert code == 0 and out.count("\n") == 1
    result = json.loads(out)
    found = result["sweep"]["points"]
    assert [(p["batch"], p["context"]) for p in found] == [(1, 32), (1, 64), (2, 32), (2, 64)]
    # Keys and values of one more position: 5 layers, 4 heads of 32, float32.
    per_position = 2 * 5 * 4 * 32 * 4
    assert found[1]["bytes_per_step"] - found[0]["bytes_per_step"] == 32 * per_position
    for p in found:
        assert p["ms_spread"][0] <= p["ms_per_step"] <= p["ms_spread"][1]
        assert p["tok_s"] == pytest.approx(1e3 * p["batch"] / p["ms_per_step"], rel=0.01)
        assert p["sums_share"] is None  # nothing to compare
    # A device holds its half of the weights and of the cache, which a step of one sequence reads.
    assert found[0]["bytes_per_step"] == 2 * found[0]["bytes_per_device"]
    assert result["sweep"]["worst_beyond_fit"] == max(p["beyond_fit"] for p in found)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_sums_cost_is_told_where_degrees_are_compared(capsys, tmp_path, monkeypatch):
    """By the same step without them, which has none left but the embedding's and the sampler's."""
    kept = []
    without = sweep._without_sums
    monkeypatch.setattr(sweep, "_without_sums", lambda llm: kept.append(without(llm)) or kept[-1])
    file = tmp_path / "sweep.svg"
    words = ("bench", "decode", "--sweep", "tensor=1/2", "--devices", "2", "--json", "--quiet")
    code, out, _ = main(capsys, *words, "--plot", str(file))
    assert code == 0
    one, two = json.loads(out)["sweep"]["points"]
    assert one["sums_share"] is None and two["sums_share"] < 1
    assert 0.5 < two["bytes_per_device"] / one["bytes_per_device"] < 0.51  # norms are whole
    assert b"share of the sums" in file.read_bytes()
    (exe,) = kept
    text = exe["decode[b1]"].as_text()
    sums = [c for c in collectives(text, dict(exe.table.plan.mesh.shape)) if c.kind == "all-reduce"]
    assert {c.where for c in sums} == {"embed"}
    with pytest.raises(UsageError, match="known are xla, rs_ag$"):
        replace(exe.table.plan, sum_algorithm="left out")


def test_a_picture_with_no_place_is_refused_before_anything_is_measured(capsys):
    words = ("--sweep", "batch", "--plot", "/no/such/x.png")
    code, _, err = main(capsys, "bench", "decode", *words)
    assert code == 4 and err.count("\n") == 1 and "No such file" in err


@pytest.mark.parametrize(
    "words, said",
    [
        (("--plot", "x.png"), "give --sweep too"),
        (("--sweep", "batch", "--compare", "hf"), "measures tpjax alone"),
        (("--sweep", "batch", "--plot", "x.txt"), "write one of .png, .svg, .pdf"),
    ],
)
def test_options_that_do_not_go_together(capsys, words, said):
    code, _, err = main(capsys, "bench", "decode", "--quiet", *words)
    assert code == 2 and said in err and err.count("\n") == 1


def test_caches_stay_while_there_is_room(monkeypatch, quiet):
    llm = LLM(bundled(), 1, max_num_seqs=4, max_model_len=64, **quiet)
    made = []
    llm.executables.build(["zeros[b1]", "zeros[b4]"])
    for name, one in list(llm.executables.built.items()):
        run = functools.partial(lambda name, run: made.append(name) or run(), name, one.run)
        llm.executables.built[name] = replace(one, run=run)
    each = KVCache.bytes_per_device(llm.config, llm.plan, 1, llm.executables.buckets.context)
    for free, anew in ((llm.memory.temporary + 4 * each, 2), (0, 6)):
        monkeypatch.setattr("tpjax.engine.memory.free", lambda plan, free=free: free)
        caches = sweep._Caches({1: llm})
        made.clear()
        for _ in range(3):
            for batch in (1, 4):
                caches.put(1, batch, caches.take(1, batch))
        assert len(made) == anew
