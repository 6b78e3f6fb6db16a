"""An audit finds what is wrong with a compiled step, by name, and nothing where nothing is."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.audited import audited
from tests.published import published
from tpjax import executables, patterns
from tpjax.audit import program, targets
from tpjax.bench import plan as grid
from tpjax.cache import KVCache
from tpjax.cli import main
from tpjax.config import ModelConfig
from tpjax.nn import decoder, embed, linear, mlp, param
from tpjax.nn.attention import Attention
from tpjax.ops import attention
from tpjax.parallel import collectives
from tpjax.parallel.rules import Rules
from tpjax.weights import WeightTable

LLAMA = published("llama-3.1-8b-instruct", 2)
SMALL = ModelConfig(
    family="llama", vocab=8192, embed=64, layers=2, heads=8, kv_heads=8, head_dim=8, mlp=96
)


# --- mistakes: each patches one thing, and says what must be found


def barrier(x):
    """What the compiler may not fuse away."""
    return jax.lax.optimization_barrier(x)


def _changed(right, change, plan, x, w, *more):
    return right(plan, x, change(plan, w), *more)


def product(change):
    """Every product's weight is first put through ``change``."""

    def patch(monkeypatch):
        for name in ("matmul", "matvec"):
            right = getattr(linear, name)
            wrong = functools.partial(_changed, right, change)
            monkeypatch.setattr(linear, name, wrong)

    return patch


def lookup(change):
    """The embedding is looked up by ``change(right, plan, table, token)``."""

    def patch(monkeypatch):
        right = embed.lookup
        wrong = lambda plan, table, token: change(right, plan, table, token)  # noqa: E731
        monkeypatch.setattr(embed, "lookup", wrong)

    return patch


def listed(monkeypatch, change):
    """The table lists what a mistaken model declares: it would else not be traced at all."""
    right = WeightTable._spec
    monkeypatch.setattr(WeightTable, "_spec", lambda self, weight: change(right, self, weight))


def output_by_column(monkeypatch):
    """The output projection split by its outputs: heads are gathered before it."""

    def by_column(right, table, weight):
        if weight.path.endswith("attn.o.w"):
            out, in_ = weight.dims
            dims = (dataclasses.replace(out, axis="mlp"), dataclasses.replace(in_, axis=None))
            weight = dataclasses.replace(weight, dims=dims)
        return right(table, weight)

    listed(monkeypatch, by_column)
    right = Attention.__init__

    def wrong(self, config, plan, layer):
        right(self, config, plan, layer)
        columns = dataclasses.replace(self.o.w.get_metadata()["dims"][0], axis="mlp")
        rows = dataclasses.replace(self.o.w.get_metadata()["dims"][1], axis=None)
        split = linear.Linear(columns, rows, plan=plan, config=config)
        self.o = split

    monkeypatch.setattr(Attention, "__init__", wrong)
    call = linear.Linear.__call__

    def gathered(self, x, onto=None):
        if (self.out_axis, self.in_axis) == ("mlp", None):
            x = jax.reshard(x, self.plan.spec("batch", None, None))
            y = jax.reshard(call(self, x), self.plan.spec("batch", None, None))
            return onto + y.astype(onto.dtype)
        return call(self, x, onto)

    monkeypatch.setattr(linear.Linear, "__call__", gathered)


def norm_that_communicates(monkeypatch):
    """Every norm makes an average over the devices, of what all of them have."""
    right = decoder.Normed

    def wrong(x, of):
        spec = jax.typeof(x).sharding.spec
        same = jax.shard_map(
            lambda x: jax.lax.pmean(x, ("tensor",)), in_specs=spec, out_specs=spec, check_vma=False
        )
        return right(same(x), of)

    monkeypatch.setattr(decoder, "Normed", wrong)


def sums_of_16_bits(monkeypatch):
    right = collectives.SUMS["xla"]

    def wrong(y, *how):
        return right(y.astype(jnp.bfloat16), *how).astype(y.dtype)

    monkeypatch.setitem(collectives.SUMS, "xla", wrong)


def sums_in_two_halves(monkeypatch):
    monkeypatch.setitem(collectives.SUMS, "xla", collectives.SUMS["rs_ag"])


def summed_twice(monkeypatch):
    right = collectives.SUMS["xla"]

    def wrong(y, partial, unsummed, spec):
        y = right(y, partial, unsummed, spec)
        again = jax.shard_map(
            lambda y: jax.lax.pmean(y, partial), in_specs=spec, out_specs=spec, check_vma=False
        )
        return again(y)

    monkeypatch.setitem(collectives.SUMS, "xla", wrong)


def logits_gathered(monkeypatch):
    from tpjax import step

    right = step.sample

    def wrong(plan, vocab, logits, rows):
        whole = jax.reshard(logits, plan.spec("batch", None))
        return right(plan, vocab, jax.reshard(whole * 2, plan.spec("batch", "vocab")), rows)

    monkeypatch.setattr(step, "sample", wrong)


def no_donation(monkeypatch):
    monkeypatch.setattr(executables, "_jit", lambda fn, donated: jax.jit(fn))


def a_second_cache(monkeypatch):
    """The old keys are used after the new ones are written, so they must be kept."""
    right = attention.write

    def wrong(cache, new, start):
        old, new = barrier((cache, right(cache, new, start)))
        return new + old * 0

    monkeypatch.setattr(attention, "write", wrong)


def a_cache_in_float32(monkeypatch):
    right = KVCache.abstract.__func__

    def wrong(cls, config, *more):
        return right(cls, dataclasses.replace(config, dtype="float32"), *more)

    monkeypatch.setattr(KVCache, "abstract", classmethod(wrong))


def heads_repeated(monkeypatch):
    """Keys and values are repeated for every query head before the scores."""
    from tpjax.ops import attention_ref

    right = attention_ref.attend

    def wrong(q, keys, values, *more):
        groups = q.shape[2] // keys.shape[1]
        keys, values = (barrier(jnp.repeat(x, groups, axis=1)) for x in (keys, values))
        return right(q, keys, values, *more)

    monkeypatch.setattr(attention_ref, "attend", wrong)


def weights_in_float32(monkeypatch):
    """Kept so, and rounded on every step."""
    wrong = lambda dims, dtype: param.weight(dims, "float32")  # noqa: E731
    monkeypatch.setattr(linear, "weight", wrong)

    def widened(right, table, weight):
        spec = right(table, weight)
        if re.search(r"\.(q|k|v|o|gate|up|down)\.[wb]$", spec.path):
            spec = dataclasses.replace(spec, dtype=np.dtype("float32"))
        return spec

    listed(monkeypatch, widened)
    product(lambda plan, w: w.astype(jnp.bfloat16))(monkeypatch)


def hidden_gathered(monkeypatch):
    """What goes into the MLP's last product is gathered and split again."""
    right = mlp.MLP.hidden

    def wrong(self, x):
        whole = jax.reshard(right(self, x), self.up.plan.spec("batch", None, None))
        return jax.reshard(barrier(whole), self.up.plan.spec("batch", None, "mlp"))

    monkeypatch.setattr(mlp.MLP, "hidden", wrong)


def of_a_stack(plan, w):
    """One of two, chosen while running."""
    stack = jnp.stack([w, w])
    which = jnp.int32(jax.device_count() > 99)
    return barrier(jax.lax.dynamic_index_in_dim(barrier(stack), barrier(which), keepdims=False))


def in_float32(right, plan, table, token):
    return right(plan, table.astype(jnp.float32), token).astype(table.dtype)


def gathered_table(right, plan, table, token):
    return table.at[token].get(out_sharding=plan.spec("batch", None, "embed"))


def over_replicas_too(right, plan, table, token):
    x = right(plan, table, token)
    spec = plan.spec("batch", None, "embed")
    same = jax.shard_map(
        lambda x: jax.lax.psum(x, ("data",)), in_specs=spec, out_specs=spec, check_vma=False
    )
    return same(x)


MISTAKES = {
    "output projection by column": (dict(patch=output_by_column), "blocks.0.attn.o.w: 512 x 4096"),
    "MLP whole": (dict(rules=Rules(mlp=())), "blocks.1.mlp.up.w: 14336 x 4096 on each device"),
    "heads whole": (dict(rules=Rules(heads=(), kv_heads=())), "blocks.0.attn.q.w: 4096 x 4096"),
    "key/value heads whole": (dict(rules=Rules(kv_heads=())), "blocks.0.attn.v.w: 1024 x 4096"),
    "vocabulary whole": (dict(rules=Rules(vocab=())), "head: 128256 x 4096 on each device"),
    "table gathered": (dict(patch=lookup(gathered_table)), "embed"),
    "table widened": (dict(patch=lookup(in_float32)), "embed: all-reduce of 16384 bytes (f32)"),
    "summed over replicas too": (
        dict(patch=lookup(over_replicas_too), data=2, tensor=4),
        "embed: none, the plan states 1 all-reduce",
    ),
    "sums in 16 bits": (dict(patch=sums_of_16_bits), "blocks.0.attn: all-reduce of 8192 bytes"),
    "sums in two halves": (dict(patch=sums_in_two_halves), "blocks.1.mlp: 1 all-gather"),
    "summed twice": (dict(patch=summed_twice), "blocks.0.attn: 2 all-reduce"),
    "a norm that communicates": (dict(patch=norm_that_communicates), "blocks.0.attn: 2 all-reduce"),
    "logits gathered": (dict(patch=logits_gathered), "all-gather"),
    "hidden gathered": (dict(patch=hidden_gathered), "blocks.0.mlp: 1 all-gather"),
    "a weight gathered": (
        dict(patch=product(lambda plan, w: gather(plan, w))),
        "blocks.0.mlp: ",
    ),
    "a weight transposed": (
        dict(patch=product(lambda plan, w: transposed(plan, w))),
        "moves: blocks.0.attn.q.w",
    ),
    "a weight widened": (
        dict(patch=product(lambda plan, w: barrier(w.astype(jnp.float32)).astype(w.dtype))),
        "moves: blocks.0.mlp.gate.w",
    ),
    "a slice of a stack": (dict(patch=product(of_a_stack)), "moves: blocks.0.mlp.gate.w"),
    "no donation": (dict(patch=no_donation), "blocks.1.attn: its values are not updated in place"),
    "a second cache": (dict(patch=a_second_cache, context=8192), "copy of bf16[1,1,8192,128]"),
    "a cache in float32": (dict(patch=a_cache_in_float32), "cache: all layers"),
    "heads repeated": (dict(patch=heads_repeated, context=8192, rows=8), "temporary"),
    "weights in float32": (
        dict(patch=weights_in_float32),
        "blocks.0.attn.q.w: float32, not bfloat16",
    ),
}


def gather(plan, w):
    """The weight whole on every device, as a plan that shards only storage would have it."""
    spec = jax.typeof(w).sharding.spec
    return jax.reshard(barrier(jax.reshard(w, plan.spec(None, None))), spec)


def transposed(plan, w):
    """The weight written in another order first."""
    spec = jax.typeof(w).sharding.spec

    def local(w):
        return barrier(w.T.reshape(-1)).reshape(w.T.shape).T

    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(w)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_and_named(greedy, monkeypatch, name):
    words, said = MISTAKES[name]
    words = {"context": 2048} | words
    words.pop("patch", lambda monkeypatch: None)(monkeypatch)
    rows = words.get("rows", words.get("data", 1))
    found = audited(LLAMA, f"decode[b{rows}]", "h100:8", greedy=True, **words).findings()
    assert any(said in str(finding) for finding in found), list(map(str, found))


def test_nothing_is_found_where_nothing_is_wrong(greedy):
    for words in ({}, {"data": 2, "tensor": 4}):
        rows = words.get("data", 1)
        audit = audited(LLAMA, f"decode[b{rows}]", greedy=True, context=2048, **words)
        assert audit.findings() == []


@pytest.mark.parametrize("point", grid.points()[5::60], ids=str)
def test_the_plan_says_what_the_compiler_says(point):
    """Arguments to the byte, temporaries within 10 % or 32 MiB, the total within 3 %: a sample of
    what `python -m tpjax.bench.plan` compiles (BENCHMARKS.md)."""
    row = grid.measure(point)
    assert row.agrees, row


def test_the_grid_is_large():
    assert len(grid.points()) >= 100


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("tensor",)),
        ("[2,4]<=[8]", ("tensor",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("mesh['data'=2,'expert'=1,'tensor'=4,'rep'=1] {'tensor'}", ("tensor",)),
        (
            "mesh['data'=2,'expert'=1,'tensor'=4,'rep'=1] {'data','expert','tensor'}",
            ("data", "tensor"),
        ),
    ],
)
def test_groups_of_devices_in_every_form(groups, axes):
    """Lists, iotas, and names, as jax 0.11 has them too."""
    line = (
        f"  %x = f32[4]{{0}} all-reduce(%y), channel_id=1, replica_groups={groups}, to_apply=%add"
    )
    sizes = {"data": 2, "expert": 1, "tensor": 4, "rep": 1}
    assert program._axes(line, sizes) == axes


# --- the command


def told(capsys, *words) -> tuple[int, dict]:
    code = main(["audit", *map(str, words), "--json", "--quiet"])
    return code, json.loads(capsys.readouterr().out)


def test_the_command_tells_everything(capsys, greedy):
    words = ["--hardware", "h100:8", "--layers", 2, "--step", "decode", "--context", 2048]
    code, report = told(capsys, "llama-3.2-1b", *words)
    (step,) = report["steps"]
    assert code == 0 and step["findings"] == [] and report["mesh"]["tensor"] == 8
    assert step["bytes"]["arguments"] == step["stated_bytes"]["arguments"]
    sums = [c for c in step["collectives"] if c["kind"] == "all-reduce"]
    assert [(c["where"], c["dtype"], c["bytes"], c["axes"]) for c in sums] == [
        ("embed", "bf16", 4096, ["tensor"]),
        ("blocks.0.attn.o", "f32", 8192, ["tensor"]),
        ("blocks.0.mlp.down", "f32", 8192, ["tensor"]),
        ("blocks.1.attn.o", "f32", 8192, ["tensor"]),
        ("blocks.1.mlp.down", "f32", 8192, ["tensor"]),
    ]
    launches = step["launches"]
    assert 2 * 8 < launches["kernels"] < 2 * 40 and launches["graphs"] >= 4
    assert launches["collectives"] == 6  # and the greedy token's
    assert main(["audit", "llama-3.2-1b", *map(str, words)]) == 0
    out = capsys.readouterr().out
    assert "all-reduce  blocks.*.mlp.down" in out and "as stated" in out


def test_a_difference_is_exit_code_1(capsys, monkeypatch, greedy):
    no_donation(monkeypatch)
    words = ["--hardware", "h100:2", "--layers", "1", "--step", "prefill", "--context", "512"]
    assert main(["audit", "llama-3.2-1b", *words, "--quiet"]) == 1
    assert "DIFFERS cache: blocks.0.attn" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--hardware", "l40s:8"], 2, "no compiler target for L40S"),
        (["--hardware", "v5e:7"], 2, "no slice has so many chips"),
        (["--hardware", "h100:8", "--tensor", "4"], 2, "tensor=4 is not h100:8: 4 of 8 devices"),
        (["--hardware", "h100:8", "--layers", "99"], 2, "--layers 99"),
        (["--hardware", "cpu:x"], 2, "write cpu:8"),
        (["--hardware", "h100:8", "--expert", "8"], 2, "llama has no experts"),
    ],
)
def test_bad_words(capsys, monkeypatch, words, code, said):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: object())
    assert main(["audit", "llama-3.2-1b", *words, "--quiet"]) == code
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("hardware, extra", [("h100:8", "compile-cuda"), ("v5e:8", "tpu")])
def test_an_absent_compiler_names_its_extra(capsys, monkeypatch, hardware, extra):
    """As importlib has it: what is in a package that is not there is an error to ask for."""

    def find_spec(name):
        if "." in name:
            raise ModuleNotFoundError(name)

    monkeypatch.setattr(targets.importlib.util, "find_spec", find_spec)
    assert main(["audit", "llama-3.2-1b", "--hardware", hardware, "--quiet"]) == 4
    assert f"tpjax[{extra}]" in capsys.readouterr().err


def test_attention_and_head_left_whole(greedy):
    """By a plan: as stated, on both kinds of target."""
    plan = {
        "blocks.*.attn.*": (None, None),
        "blocks.*.mlp.down": ("tensor", "embed"),
        "blocks.*.mlp.*": ("embed", "tensor"),
        "embed": ("tensor", None),
        "head": (None, None),
    }
    words = {"context": 2048, "patterns": patterns.normal(plan), "allow": ("*",)}
    for hardware in ("h100:8", "cpu:8"):
        config = LLAMA if hardware == "h100:8" else SMALL
        audit = audited(config, "decode[b1]", hardware, greedy=True, **words)
        assert audit.findings() == [] and len(audit.sums()) == config.layers + 1
