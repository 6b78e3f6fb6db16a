"""Imports point down, and things live where they may. Reads the source; imports nothing of it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "tpjax").rglob("*.py")) + sorted((ROOT / "checkpoints_tools").rglob("*.py"))

# A module may import from its own layer and those before it.
LAYERS = [
    ["errors", "kept", "host"],
    ["rope", "config", "params", "buckets", "picture"],
    ["facts"],
    ["models"],
    ["parallel"],
    ["inventory"],
    ["patterns"],
    ["plan", "env"],
    ["native"],
    ["cache", "ops", "nn"],
    ["weights", "padding", "sampling"],
    ["step", "executables", "checkpoint"],
    ["engine", "planner"],
    ["audit"],
    ["devices"],
    ["report", "generate", "bench"],
    ["cli", "__init__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# word -> where it may be written (prefixes below tpjax/)
MAY_NAME = {
    "PartitionSpec": ("parallel/", "plan.py"),
    "NamedSharding": ("parallel/", "plan.py"),
    "psum": ("parallel/", "ops/"),
    "psum_scatter": ("parallel/", "ops/"),
    "all_gather": ("parallel/", "ops/"),
    "ppermute": ("parallel/", "ops/"),
    "all_to_all": ("parallel/", "ops/"),
    "shard_map": ("parallel/", "ops/"),
    "jit": ("executables.py", "bench/"),
    "environ": ("env.py",),
    "getenv": ("env.py",),
    "device_get": ("engine/engine.py",),
}
# Legacy files, and peers: in processes of their own, or when they are asked for.
TORCH = (
    "checkpoints_tools/sources.py",
    "checkpoints_tools/logits.py",
    "tpjax/bench/peers/hf.py",
    "tpjax/bench/peers/hf_start.py",
)
LOGICAL_AXES = {"vocab", "heads", "kv_heads", "mlp", "expert_mlp"}


def below(path: Path) -> str:
    return str(path.relative_to(ROOT / "tpjax")) if "tpjax/" in str(path) else str(path)


def module_of(path: Path) -> str:
    return below(path).split("/")[0].removesuffix(".py")


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file(path):
    tree = ast.parse(path.read_text())
    imported = set(imports(tree))
    if str(path.relative_to(ROOT)) not in TORCH:
        assert not any(name.split(".")[0] == "torch" for name in imported), "torch is for tests"
    if path.is_relative_to(ROOT / "tpjax"):
        assert not any(name.startswith("checkpoints_tools") for name in imported)
        _check_layers(path, imported)
        _check_words(path, set(names(tree)))
    assert ast.get_docstring(tree) or path.name == "__init__.py", "a file says what it is"
    # About 400 lines is where a second idea hides.
    assert len(path.read_text().splitlines()) <= 420


def _check_layers(path: Path, imported: set[str]) -> None:
    mine = LEVEL[module_of(path)]
    for name in imported:
        parts = name.split(".")
        if parts[0] != "tpjax" or len(parts) < 2 or parts[1] not in LEVEL:
            continue
        assert LEVEL[parts[1]] <= mine, f"{below(path)} imports {name}, which is above it"


def _check_words(path: Path, words: set[str]) -> None:
    for word in words & MAY_NAME.keys():
        assert below(path).startswith(MAY_NAME[word]), f"{below(path)} names {word}"


def test_no_jax_in_what_must_plan_without_devices():
    files = [
        "config.py",
        "rope.py",
        "parallel/degrees.py",
        "parallel/dims.py",
        "parallel/layout.py",
        *(f"planner/{file.name}" for file in (ROOT / "tpjax/planner").glob("*.py")),
        "errors.py",
        "params.py",
        "buckets.py",
        "picture.py",
        "engine/request.py",
        "cli.py",
    ]
    files += ["checkpoint/layout.py", "checkpoint/manifest.py", "../checkpoints_tools/cli.py"]
    for file in files:
        imported = set(imports(ast.parse((ROOT / "tpjax" / file).read_text())))
        assert not any(name.split(".")[0] in ("jax", "flax") for name in imported), file


def test_engine_and_families_do_not_speak_of_logical_axes():
    """They get shardings from the table; which axis is split how is the model's and the plan's."""
    for folder in ("engine", "models"):
        for path in (ROOT / "tpjax" / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
            assert not strings & LOGICAL_AXES, path
