"""Plans by pattern: what they decide, what they refuse, and transformers' own plans."""

import pytest
import transformers

import tpjax
from tests import reference
from tests.bad import refused
from tests.families import FAMILIES
from tests.published import published
from tpjax import patterns
from tpjax.audit.verdict import Audit
from tpjax.buckets import Buckets
from tpjax.checkpoint.folder import bundled
from tpjax.cli import main
from tpjax.errors import UsageError
from tpjax.executables import Executables
from tpjax.parallel.layout import Layout
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan
from tpjax.weights import WeightTable

COLUMN, ROW, WHOLE = ("embed", "tensor"), ("tensor", "embed"), (None, None)
OURS = {
    "blocks.*.attn.[qkv]": COLUMN,
    "blocks.*.attn.o": ROW,
    "blocks.*.mlp.gate": COLUMN,
    "blocks.*.mlp.up": COLUMN,
    "blocks.*.mlp.down": ROW,
    "embed": ROW,
    "head": COLUMN,
}
LLAMA = published("llama-3.1-8b-instruct", 3)


def decided(plan: dict, config=LLAMA, allow=(), **sizes) -> patterns.Decided:
    layout = Layout.of(**(sizes or {"tensor": 8})).fit(config)
    return patterns.decide(config, layout, patterns.normal(plan), allow)


def test_the_usual_plan_by_pattern_is_the_usual_plan():
    found = decided(OURS)
    assert found.unsplit == ()
    assert found.by["blocks.2.attn.k.w"] == "blocks.*.attn.[qkv]"


def test_the_first_match_decides():
    mlp = {f"blocks.1.mlp.{name}": WHOLE for name in ("gate", "up", "down")}
    found = decided(mlp | OURS, allow=["blocks.1.mlp.*"])
    assert found.unsplit == (("blocks.1.mlp", frozenset({"mlp"})),)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"blocks.*.attn.qq": COLUMN}, "'blocks.*.attn.qq': matches no weight"),
        ({"blocks.0.attn.q*": COLUMN}, "'blocks.0.attn.q*': never decides, 'blocks.*.attn.[qkv]'"),
        ({"blocks.*.attn.o": COLUMN}, "blocks.0.attn.o.w cannot be split over 'tensor' there"),
        ({"blocks.*.mlp.down": WHOLE}, "blocks.0.mlp.down.w: 117 MB whole on each device"),
        ({"head": ("embed", "tenser")}, "unknown axis 'tenser'"),
        ({"head": ("embed", "data")}, "unknown axis 'data'"),
        ({"head": ("embed", "mlp")}, "head cannot be split over 'mlp' there"),
        ({"head": ("embed", "tensor", None)}, "3 axes, but head has 2: embed, vocab"),
        ({"head": 7}, "7 are no axes"),
        ({"head": "colwize"}, "unknown style 'colwize'"),
        ({"blocks.*.mlp.up": None}, "None are no axes"),
    ],
)
def test_what_is_refused(change, said):
    with refused(UsageError, said):
        decided(OURS | change)


def test_large_weights_nobody_splits():
    less = {k: v for k, v in OURS.items() if k != "embed"}
    with refused(UsageError, "embed.w: 1051 MB whole on each device, no pattern does split"):
        decided(less)
    assert decided(less, allow=["embed"]).unsplit == (("embed", frozenset({"vocab"})),)


def test_experts_whole_on_every_device():
    config = published("mixtral-8x7b-v0.1", 2)
    moe = {"blocks.*.moe.router": WHOLE, "blocks.*.moe.*": (None, None, None)}
    plan = moe | {k: v for k, v in OURS.items() if "mlp" not in k}
    for sizes in ({"expert": 8}, {"tensor": 8}, {"expert": 2, "tensor": 4}):
        with refused(UsageError, "blocks.0.moe.gate: 940 MB whole on each device"):
            decided(plan, config, **sizes)
    assert (
        decided(plan | {"blocks.*.moe.*": ("expert", None, None)}, config, expert=8).unsplit == ()
    )


def test_partners_must_agree():
    """Though both are allowed to be whole."""
    with refused(
        UsageError, "blocks.0.mlp.gate, blocks.0.mlp.up: split along mlp, but", "down not"
    ):
        decided(OURS | {"blocks.*.mlp.down": WHOLE}, allow=["*.down"])
    whole = {"blocks.*.attn.q": WHOLE, "blocks.*.attn.o": WHOLE, "blocks.*.attn.[kv]": COLUMN}
    rest = {k: v for k, v in OURS.items() if "attn" not in k}
    with refused(UsageError, "blocks.0.attn.k: split along kv_heads, but"):
        decided(whole | rest, allow=["*.attn.*"])


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_file(tmp_path, capsys, suffix):
    file = tmp_path / f"plan{suffix}"
    text = {
        ".toml": '[patterns]\n"blocks.*" = ["-", "-"]\n"embed" = ["tensor", "embed"]\n'
        '"head" = ["embed", "tensor"]\n',
        ".json": '{"blocks.*": [null, null], "embed": ["tensor", "embed"],'
        ' "head": ["embed", "tensor"]}',
    }[suffix]
    file.write_text(text)
    words = ["plan", "llama-3.2-1b", "--hardware", "h100:2", "--tensor", "2", "--plan", str(file)]
    assert main(words) == 2
    assert "--allow blocks.0.attn.q.w" in capsys.readouterr().err
    for broken, said in ((text.replace("tensor", "tensr", 1), "tensr"), ("{", "not a plan")):
        file.write_text(broken)
        assert main(words) == 2 and said in capsys.readouterr().err
    file.write_text('{"head": ["a"], "head": ["b"]}')
    if suffix == ".json":
        assert main(words) == 2 and "is there twice" in capsys.readouterr().err


def test_explained_by_pattern(tmp_path, capsys):
    file = tmp_path / "plan.json"
    file.write_text('{"blocks.*": [null, null], "embed": ["tensor", "embed"]}')
    words = ["--hardware", "h100:2", "--tensor", "2", "--plan", str(file), "--allow", "blocks.*"]
    assert main(["plan", "llama-3.2-1b", *words, "--explain"]) == 0
    out = capsys.readouterr().out
    assert "sum 1 times per token" in out
    (line,) = [line for line in out.splitlines() if line.startswith("blocks.0-15.mlp.up.w")]
    assert "blocks.*" in line and "-, -" in line


def test_a_layer_whole_computes_the_same(tiny_model):
    """One layer's MLP and another's attention on every device: the same logits, and the sums that
    are left are those the audit expects."""
    folder, hf = tiny_model(num_key_value_heads=4)
    plan = {"blocks.1.mlp.*": WHOLE, "blocks.0.attn.*": WHOLE} | OURS
    plan = Plan.from_patterns(plan, mesh=make_mesh(tensor=4), allow=["blocks.*"])
    llm = reference.load(folder, plan=plan, max_model_len=128, max_num_seqs=2)
    assert reference.agrees(llm, hf)
    params = tpjax.SamplingParams(temperature=0, max_tokens=8)
    prompts = [reference.prompt(n) for n in (5, 20)]
    got = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
    assert got == [reference.greedy(hf, ids, 8) for ids in prompts]
    exe = llm.executables
    audit = Audit(exe["decode[b2]"], exe, "decode[b2]")
    assert audit.findings() == [] and len(audit.sums()) == 2 * llm.config.layers + 1 - 2


def test_generate_takes_a_plan(tmp_path, capsys):
    """The same text, every layer whole on each device; and what is no plan is refused first."""
    file = tmp_path / "plan.json"
    file.write_text('{"blocks.*": [null, null], "embed": ["tensor", "embed"]}')
    words = ["generate", "--quiet", "--max-tokens", "8", "--temperature", "0", "-tp", "2"]
    assert main(words) == 0
    usual = capsys.readouterr().out
    assert main([*words, "--plan", str(file), "--allow", "blocks.*"]) == 0
    assert capsys.readouterr().out == usual
    file.write_text('{"block.*": [null, null]}')
    assert main([*words, "--plan", str(file)]) == 2
    assert "'block.*': matches" in capsys.readouterr().err
    assert main([*words, "--allow", "embed"]) == 2
    assert "--allow embed: is for --plan FILE" in capsys.readouterr().err
    plan = Plan.from_patterns({"blocks.*": WHOLE}, mesh=make_mesh(tensor=2))
    with refused(UsageError, "give patterns once"):
        tpjax.LLM(bundled(), plan=plan, patterns={"blocks.*": WHOLE})


# --- transformers' plans

THEIRS = [f for f in FAMILIES if f not in ("opt", "gemma3_text")]


def theirs(family: str) -> dict[str, str]:
    """As transformers ships it: of the base model, and of its head."""
    tiny = next(iter(FAMILIES[family].values()))
    config = getattr(transformers, tiny.config)
    model = getattr(transformers, tiny.config.replace("Config", "ForCausalLM"))
    return dict(config.base_model_tp_plan) | dict(model._tp_plan or {})


@pytest.mark.parametrize("family", THEIRS)
def test_plans_of_transformers_are_our_own(tmp_path, family):
    """Every weight they name (none names the embedding, Qwen2-MoE's not its shared expert) is split
    as ours; and the audit of a step finds nothing."""
    assert len(THEIRS) >= 8
    tiny = next(iter(FAMILIES[family].values()))
    tiny.make(tmp_path)
    config = reference.load(tmp_path, max_model_len=64).config
    plan = Plan.from_patterns(theirs(family), mesh=make_mesh(tensor=4), allow=["embed", "head"])
    plan, ours = plan.fit(config), Plan(mesh=make_mesh(tensor=4)).fit(config)
    table, own = WeightTable(config, plan), WeightTable(config, ours)
    named = patterns.decide(config, ours.layout, plan.patterns, plan.allow).by
    matrices = {s.path for s in own.specs if len(s.dims) > 1 and ".moe.shared" not in s.path}
    assert matrices - named.keys() <= {"embed.w"} | {p for p in matrices if "router" in p}
    for spec, usual in zip(table.specs, own.specs, strict=True):
        if spec.path in named or len(spec.dims) == 1:
            assert (spec.dims, spec.sharding) == (usual.dims, usual.sharding), spec.path
    exe = Executables(table, Buckets.make(64, 1, 1))
    assert Audit(exe.lower("decode[b1]").compile(), exe, "decode[b1]").findings() == []
