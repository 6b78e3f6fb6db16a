"""Checkpoints of every family go to tpjax and back: fused projections and experts too."""

import functools

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from checkpoints_tools.convert import convert
from checkpoints_tools.export import export
from checkpoints_tools.verify import verify
from tests.bad import WEIGHTS
from tests.families import FAMILIES
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint import load
from tpjax.checkpoint.orbax import OrbaxFolder
from tpjax.checkpoint.tensors import Tensors, device_bounds
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan
from tpjax.weights import WeightTable

# Of each family the model with the most to get wrong on disk.
CASES = {family: list(of.values())[0] for family, of in FAMILIES.items()} | {
    "opt, projected": FAMILIES["opt"]["after, projected"],
    "qwen2_moe, some dense": FAMILIES["qwen2_moe"]["some sparse"],
    "phi3, one kv head": FAMILIES["phi3"]["partly rotated, window"],
}
EVEN = {"tensor": 1}
UNEVEN = {"tensor": 3}
COPIES = {"tensor": 8}
SHARED = {"expert": 2, "tensor": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    @functools.cache
    def get(name):
        root = tmp_path_factory.mktemp("family")
        CASES[name].make(root / "hf")
        convert(root / "hf", root / "tpjax")
        return root

    return get


def table_of(folder, mesh):
    model = folders.read_folder(folder)
    return WeightTable(model.config, Plan(mesh=make_mesh(**mesh)).fit(model.config)), model.family


@pytest.mark.parametrize("mesh", [EVEN, UNEVEN, COPIES, SHARED], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_restores_what_the_source_gives(made, name, mesh):
    """Bit for bit, read fast and read in full; padding is zero."""
    root = made(name)
    if "expert" in mesh and folders.read_folder(root / "hf").config.moe is None:
        mesh = {"tensor": 5}
    table, family = table_of(root / "hf", mesh)
    direct = load.load(table, family, load.open_source(root / "hf"))
    for how in ("fast", "full"):
        restored = load.load(table, family, load.open_source(root / "tpjax", how))
        for spec, ours, theirs in zip(table.specs, restored, direct, strict=True):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), spec.path
    for spec, leaf in zip(table.specs, direct, strict=True):
        elements = int(np.prod(spec.stored))
        assert np.count_nonzero(leaf) <= elements and leaf.sharding == spec.sharding


@pytest.mark.parametrize("name", CASES)
def test_every_stored_element_is_somewhere(made, name):
    """At an uneven degree, each tensor's values are in the leaves as often as in the file."""
    root = made(name)
    table, family = table_of(root / "hf", UNEVEN)
    source = load.open_source(root / "hf")
    leaves = load.load(table, family, source)
    held = np.sort(np.concatenate([np.asarray(x).reshape(-1) for x in leaves]))
    stored = load_file(root / "hf" / WEIGHTS)
    wanted = {source.key(tensor) for tensor in Tensors(table, family, source.tensors).all}
    values = np.sort(np.concatenate([stored[name].reshape(-1) for name in wanted]))
    assert np.array_equal(held[held != 0], values[values != 0])


@pytest.mark.parametrize("name", CASES)
def test_verify_and_export(made, name, tmp_path):
    root = made(name)
    for tensor in (None, 1, 3, 8):
        result = verify(root / "tpjax", against=root / "hf", tensor=tensor)
        assert result["problems"] == [] and result["weights"] > 10
    export(root / "tpjax", tmp_path / "back")
    stored, back = load_file(root / "hf" / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert stored.keys() == back.keys()
    assert all(stored[name].tobytes() == back[name].tobytes() for name in stored)


@pytest.mark.parametrize("name", ["phi3", "mixtral"])
def test_orbax_restores_it(made, name):
    """Orbax's own checkpointer gives the tensors of the source."""
    root = made(name)
    table, family = table_of(root / "hf", EVEN)
    names = {tensor.path: tensor.name for tensor in Tensors(table, family).all}
    stored = load_file(root / "hf" / WEIGHTS)
    restored = ocp.StandardCheckpointer().restore(root / "tpjax" / "weights")
    paths = jax.tree.leaves_with_path(restored)
    assert len(paths) == len(names)
    for path, leaf in paths:
        tensor = stored[names[".".join(key.key for key in path)]]
        assert np.asarray(leaf).tobytes() == tensor.tobytes()


@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"expert": 2, "tensor": 2}], ids=str)
def test_a_device_reads_its_own_experts(made, mesh):
    """Its share of the experts' bytes, and 2 % more at most."""
    root = made("mixtral")
    table, family = table_of(root / "hf", mesh)
    source, tensors = OrbaxFolder(root / "tpjax", "fast"), Tensors(table, family)
    for path in ("blocks.0.moe.gate", "blocks.0.moe.down"):
        spec = table.by_path[path]
        for bounds in device_bounds(spec):
            source.bytes_read = 0
            load.read_slice(spec, source, tensors, bounds)
            share = spec.bytes / table.plan.tensor_degree
            assert share <= source.bytes_read <= 1.02 * share
