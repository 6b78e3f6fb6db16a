"""Restore a checkpoint by Orbax's own checkpointer on eight devices, and compare every array with
the manifest: what tpjax wrote, however it was sliced, is what Orbax reads."""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash

from tpjax import env
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint.layout import NUMPY
from tpjax.checkpoint.manifest import WEIGHTS, Manifest
from tpjax.checkpoint.orbax import as_bytes
from tpjax.parallel.degrees import even_degrees
from tpjax.parallel.mesh import make_mesh
from tpjax.plan import Plan
from tpjax.weights import WeightTable


def target(folder: Path, tensor: int) -> tuple[dict, WeightTable]:
    """What to restore, as nested dicts of shapes with shardings, and the weights' table."""
    config = folders.read_folder(folder).config
    table = WeightTable(config, Plan(mesh=make_mesh(tensor=tensor)).fit(config))
    stored = {weight.path: NUMPY[weight.dtype] for weight in Manifest.read(folder).weights}
    tree: dict = {}
    for spec in table.specs:
        *above, last = spec.path.split(".")
        at = tree
        for key in above:
            at = at.setdefault(key, {})
        # What a padded vocabulary would be split into is not what is stored: every device gets all.
        split = spec.sharding if spec.shape == spec.stored else table.plan.sharding()
        at[last] = jax.ShapeDtypeStruct(spec.stored, stored[spec.path], sharding=split)
    return tree, table


def restore(folder: Path, tensor: int) -> tuple[dict, WeightTable]:
    """The tree of arrays, as Orbax restores it, and the weights' table."""
    tree, table = target(folder, tensor)
    restored = ocp.StandardCheckpointer().restore(folder.absolute() / WEIGHTS, tree)
    return jax.block_until_ready(restored), table


def differing(folder: Path, tensor: int) -> list[str]:
    """The weights that Orbax restores as something else than what the manifest says."""
    restored, _ = restore(folder, tensor)
    wrong = []
    for weight in Manifest.read(folder).weights:
        leaf = restored
        for key in weight.path.split("."):
            leaf = leaf[key]
        value = np.asarray(leaf)
        same = (value.shape, value.dtype) == (weight.shape, NUMPY[weight.dtype])
        if not same or xxhash.xxh3_128_hexdigest(as_bytes(value).data) != weight.digest:
            wrong.append(weight.path)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    env.start(devices=8)
    tensor = max(d for d in even_degrees(folders.read_folder(args.folder).config) if d <= 8)
    wrong = differing(args.folder, tensor)
    print(json.dumps({"tensor": tensor, "differing": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
