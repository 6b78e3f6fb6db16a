"""The command as a user runs it: output, exit codes, one clear line for what is wrong."""

import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tpjax import cli, env
from tpjax.bench import peers, record
from tpjax.bench.decode import read_share

ROOT = Path(__file__).parent.parent


def run(*words: str, code: int = 0, **env: str) -> subprocess.CompletedProcess:
    """A fresh process of examples/generate.py or of the command."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS", "TPJAX_KEPT")
    }
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean | env,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    first = run("examples/generate.py", XDG_CACHE_HOME=cache)
    second = run("-m", "tpjax.cli", "generate", XDG_CACHE_HOME=cache)
    return first, second


def test_without_arguments_it_makes_text_on_four_devices(default_run):
    first, second = default_run
    assert len(first.stdout.split()) >= 40 and first.stdout == second.stdout
    assert first.stdout.count("\n") >= 5 and ":\n" in first.stdout  # lines and speakers
    for told in ("mesh data=1 x tensor=4 x rep=1", "heads     2-3  kv 1", "per device: weights"):
        assert told in first.stderr
    assert "first token after" in first.stderr and "tokens/s" in first.stderr


def test_it_starts_quietly_although_the_cuda_plugin_is_installed(default_run):
    """The plugin is there (the test extra installs it), a GPU is not."""
    assert importlib.util.find_spec("jax_plugins.xla_cuda12")
    start = "from tpjax import env; env.start()"
    child = run("-c", start, XLA_FLAGS="--xla_cpu_experimental_ynn_fusion_type=individual_dot")
    for done in (*default_run, child):
        for noise in ("cudart", "absl", "Traceback", "Unable to load CUDA", "Warning", "warning"):
            assert noise not in done.stderr


def test_the_second_start_compiles_nothing(default_run):
    first, second = default_run
    assert first.stderr.count("cached next time") == 3 and "from the cache" not in first.stderr
    assert second.stderr.count("from the cache") == 3 and "cached next time" not in second.stderr


@pytest.mark.parametrize(
    "words, code",
    [
        ("--help", 0),
        ("--version", 0),
        ("--wrong", 2),
        ("generate --help", 0),
        ("generate --version", 0),
        ("generate --temperature -1", 2),
        ("generate --max-tokens 0", 2),
        ("generate --dtype int3", 2),
        ("generate --max-model-len 1", 2),
        ("generate --stop=", 2),
        ("generate --prompt=", 2),
        ("generate -tp 0", 2),
        ("generate --stream --json", 2),
        ("generate --system x", 2),
        ("bench decode --rounds 1", 2),
        ("bench decode --batch 0", 2),
    ],
)
def test_help_and_usage_errors_answer_at_once(words, code):
    """Within 14 times the processor time of an empty program, which is 0.3 s on a quiet machine,
    and without importing jax; the best of three of each, since others may be at work."""
    words = words.split()

    def seconds(*words: str, code: int = 0) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(*words, code=code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    ours, empty = zip(
        *((seconds("-m", "tpjax.cli", *words, code=code), seconds("-c", "")) for _ in range(3)),
        strict=True,
    )
    assert min(ours) < 14 * min(empty)
    imported = run("-X", "importtime", "-m", "tpjax.cli", *words, code=code).stderr
    assert " jax" not in imported and "transformers" not in imported


def test_the_users_own_xla_flags_win():
    """An unrelated flag is kept beside ours, and ours gives way to the user's value of the same."""
    code = "import os; from tpjax import env; env.start(); print(os.environ['XLA_FLAGS'])"
    kept = run("-c", code, XLA_FLAGS="--xla_cpu_enable_fast_math=false").stdout
    assert "--xla_cpu_enable_fast_math=false" in kept and "ynn" in kept
    mine = "--xla_cpu_experimental_ynn_fusion_type=invalid"
    assert run("-c", code, XLA_FLAGS=mine).stdout.strip() == mine


def main(capsys, *words: str):
    code = cli.main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_has_one_object_per_prompt(capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("KING\n\nQUEEN\n")
    words = ["generate", "--prompt", "ROMEO", "--prompts-file", str(file), "--json", "--quiet"]
    code, out, err = main(capsys, *words, "--max-tokens", "4", "--temperature", "0")
    assert code == 0 and err == ""
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["ROMEO", "KING", "QUEEN"]
    for line in lines:
        assert set(line) == {"prompt", "text", "token_ids", "finish_reason"}
        assert len(line["token_ids"]) == 4 and line["finish_reason"] == "length"


def test_streamed_and_whole_text_are_the_same(capsys):
    words = ["generate", "--prompt", "KING", "--max-tokens", "12", "--quiet", "--seed", "4"]
    _, whole, _ = main(capsys, *words)
    code, streamed, _ = main(capsys, *words, "--stream")
    assert code == 0 and streamed == whole


@pytest.mark.parametrize(
    "words, code, told",
    [
        (["--temperature", "-1"], 2, "temperature=-1.0"),
        (["--max-tokens", "0"], 2, "max_tokens=0"),
        (["--prompts-file", "/nowhere/at/all"], 2, "/nowhere/at/all"),
        (["--prompt", ""], 2, "empty prompt"),
        (["-tp", "0"], 2, "--tensor-parallel-size 0"),
        (["--expert-parallel-size", "2"], 2, "nearest tensor degree that works is 8"),
        (["--dtype", "int3"], 2, "int3"),
        (["--model", "/nowhere/at/all"], 3, "no such folder"),
        (["--model", "tests/data"], 3, "no config.json"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_exit_code(capsys, words, code, told):
    got, out, err = main(capsys, "generate", "--quiet", *words)
    assert (got, out) == (code, "") and told in err
    assert err.startswith("tpjax: error: ") and err.count("\n") == 1


def test_more_devices_than_there_are():
    done = run("-m", "tpjax.cli", *"generate --quiet --devices 2 -tp 8".split(), code=4)
    assert "needs 8 devices, 2 cpu device(s) found" in done.stderr
    assert "--devices 8" in done.stderr and done.stderr.count("\n") == 1


def test_a_cache_directory_that_cannot_be_written(tmp_path):
    """It works as ever, without jax's warnings and without a promise for next time."""
    (tmp_path / "file").write_text("")
    err = run(
        "-m",
        "tpjax.cli",
        *"generate --max-tokens 2".split(),
        XDG_CACHE_HOME=str(tmp_path / "file"),
    ).stderr
    assert "compiling decode[b1]" in err and "next time" not in err and "arning" not in err


def test_the_users_own_number_of_devices_is_kept():
    """Without -tp all of them are used, as far as the model allows: 6 devices, 8 heads."""
    words = "-m tpjax.cli generate --max-tokens 2".split()
    err = run(*words, JAX_NUM_CPU_DEVICES="6", JAX_PLATFORMS="cpu").stderr
    assert "using 4 of 6 devices: more would need padding" in err and "tensor=4 x rep=1" in err


def nodes(monkeypatch, *there: str, plugins: bool = True):
    monkeypatch.setattr("tpjax.env.Path.exists", lambda path: str(path) in there)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: plugins or None)
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_an_accelerator_counts_only_if_jax_can_use_it(monkeypatch):
    nodes(monkeypatch, "/dev/nvidia0")
    assert env.has_accelerator()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not env.has_accelerator()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not env.has_accelerator()
    nodes(monkeypatch, "/dev/accel0")
    assert env.has_accelerator()
    nodes(monkeypatch, "/dev/nvidia0", plugins=False)
    assert not env.has_accelerator()
    nodes(monkeypatch)
    assert not env.has_accelerator()


def test_an_unexpected_failure_is_one_line_too_and_debug_shows_it_all(capsys, monkeypatch):
    def broken(args):
        raise ZeroDivisionError("of all things\nand more")

    monkeypatch.setattr("tpjax.generate.generate", broken)
    code, _, err = main(capsys, "generate")
    assert code == 5 and err.count("\n") == 1 and "ZeroDivisionError: of all things" in err
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate", "--debug"])


def test_a_peer_that_is_absent_or_ends_is_told(capsys, monkeypatch):
    for needs, said in (((), "--compare hf: it ended"), (("no-such",), "pip install no-such")):
        monkeypatch.setitem(peers.PEERS, "hf", peers.System(needs, "tpjax.bench.no_such"))
        code, _, err = main(capsys, "bench", "decode", "--quiet", "--compare", "hf")
        assert code == 4 and said in err


def test_peers_that_cannot_be(capsys):
    for words, code, said in (
        (
            ("--compare", "hf,vllm"),
            2,
            "--compare vllm: known are hf, hf-tp, torch-compile, llama.cpp",
        ),
        (("--compare", "hf-tp", "-tp", "1"), 4, "give -tp 2 or more"),
    ):
        given, _, err = main(capsys, "bench", "decode", "--quiet", *words)
        assert given == code and said in err and err.count("\n") == 1


def test_bench_prefill_measures_prompts_alone(capsys, tmp_path):
    file = tmp_path / "BENCHMARKS.md"
    words = ["bench", "prefill", "-tp", "2", "--prompt-length", "40", "--record", str(file)]
    code, out, _ = main(capsys, *words, "--json", "--quiet")
    result = json.loads(out)
    assert code == 0 and result["prefill_tok_s"] > 0 and "decode_tok_s" not in result
    low, high = result["prefill_tok_s_spread"]
    assert low <= result["prefill_tok_s"] <= high
    assert main(capsys, *words, "--json", "--quiet")[0] == 0
    rows = [line for line in file.read_text().splitlines() if line.startswith("| 20")]
    assert len(rows) == 2 and all(" | - | - | " in row for row in rows)
    assert record.BESIDE not in file.read_text()


def test_rows_go_to_the_ends_of_their_tables(tmp_path):
    file = tmp_path / "B.md"
    origin = dict(date="2026-01-02", commit="abc", versions="v", command="tpjax bench")
    peer = dict(about="x 1", prefill_tok_s=5, prefill_ratio=[1, 2, 3])
    result = origin | dict(
        model="m/config.json",
        dtype="bfloat16",
        mesh=dict(data=1, tensor=2),
        batch=1,
        prompt_length=8,
        load_s=None,
        compile_s=1.0,
        prefill_tok_s=10,
        prefill_tok_s_spread=[9, 11],
        read_bandwidth=4e9,
        peers=dict(hf=peer),
    )
    record.append(file, result)
    file.write_text(file.read_text() + "\nWords at the end.\n")
    record.append(file, result)
    lines = file.read_text().splitlines()
    assert lines[-1] == "Words at the end."
    assert [line[:4] for line in lines if line.startswith(("| 20", "## "))] == [
        *("## R", "| 20", "| 20"),
        *("## R", "| 20", "| 20"),
    ]
    assert "| prefill | 10 (9 to 11) | hf (x 1) | 5 | 2 (1 to 3) | 4.0 |" in file.read_text()


@pytest.mark.slow
def test_bench_start_and_load(capsys):
    code, out, _ = main(capsys, "bench", "start", "-tp", "1", "--json", "--quiet")
    assert code == 0
    result = json.loads(out)
    low, high = result["start_s_spread"]
    assert low <= result["start_s"] <= high < result["first_start_s"]
    assert result["files_bytes"] < result["peak_bytes"] and result["dtype"] == "float32"
    assert 0 <= result["new_memory_s"] < low  # it is a small model
    code, out, _ = main(capsys, "bench", "load", "-tp", "2", "--json", "--quiet")
    assert code == 0
    result = json.loads(out)
    assert result["tensor"] == 2 and result["load_s"] > 0 and result["read_GB_per_s"] > 0


@pytest.mark.parametrize(
    "words, code, said",
    [
        (("start", "--rounds", "4"), 2, "a median needs at least 5"),
        (("start", "--compare", "llama.cpp"), 2, "--compare llama.cpp: known are hf"),
        (("load", "--dtype", "int8"), 2, "dtype='int8'"),
        (("load", "-tp", "0"), 2, "--tensor-parallel-size 0: must be between 1"),
        (("start", "--devices", "0"), 2, "--devices 0: must be between 1"),
        (("load", "--model", "/no/such"), 3, "no such folder"),
        (("prefill", "--prompt-length", "0"), 2, "--prompt-length 0: must be 1 or more"),
    ],
)
def test_what_cannot_be_measured(capsys, words, code, said):
    given, out, err = main(capsys, "bench", *words, "--quiet")
    assert given == code and said in err and err.count("\n") == 1 and out == ""


def test_a_start_that_makes_no_token_is_told(capsys, folder):
    """This folder has no tokenizer, so there is no text to wait for."""
    words = ("bench", "start", "--model", str(folder), "-tp", "1", "--quiet")
    capsys.readouterr()
    code, _, err = main(capsys, *words)
    assert code == 5 and "ended without a token; it said: tpjax: error:" in err
    assert err.count("\n") == 1


def test_bench_decode_prints_one_object_and_records_a_row(capsys, tmp_path):
    file = tmp_path / "BENCHMARKS.md"
    file.write_text("# Benchmarks\n\nWords.\n")
    words = [
        "bench",
        "decode",
        "-tp",
        "2",
        "--prompt-length",
        "9",
        "--max-tokens",
        "6",
        "--batch",
        "2",
    ]
    more = ("--json", "--quiet", "--record", str(file), "--compare", "hf")
    code, out, _ = main(capsys, *words, *more)
    assert code == 0 and out.count("\n") == 1
    result = json.loads(out)
    peer = result["peers"]["hf"]
    assert peer["about"].startswith("transformers ") and peer["decode_tok_s"] > 0
    for name in ("prefill_ratio", "decode_ratio"):
        least, median, most = peer[name]
        assert least <= median <= most  # so short a run is mostly noise
    for name in (
        "load_s compile_s prefill_tok_s decode_tok_s ms_per_token bytes_per_token"
        " read_bandwidth read_bandwidth_share"
    ).split():
        assert result[name] > 0, name
    # What a step reads: every weight of this tied model once, matrices in 16 bits as they are
    # stored, norms on both devices; and the cache of two sequences.
    norms = 11 * 256
    cache = 2 * 5 * 2 * 32 * 4 * 32 * 4
    assert result["bytes_per_token"] == 2 * (result["parameters"] - norms) + 2 * 4 * norms + cache
    text = file.read_text()
    assert text.startswith("# Benchmarks\n\nWords.\n") and record.HEADING in text
    lines = text.splitlines()
    assert lines[-1].count("|") == record.BESIDE_COLUMNS.count("|") + 2
    assert "| decode |" in lines[-1]
    row = lines[lines.index(record.HEADING) + 4]
    assert row.count("|") == record.COLUMNS.count("|") + 2
    assert 0 <= result["host_ms"]["many"] <= result["host_ms"]["each"] + 1


def test_a_share_is_of_what_was_probed_in_the_same_round():
    """As much in every round, while the memory's pace changes."""
    assert read_share(6, [2.0, 1.0, 3.0], [6.0, 12.0, 4.0]) == 0.5
