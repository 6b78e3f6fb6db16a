"""The files that make a folder of Zarr arrays an Orbax checkpoint.

Orbax 0.11 and 0.12 read the tree from ``_METADATA`` and the arrays from the folders named by the
joined keys (``use_ocdbt`` false, ``use_zarr3`` true). Times are left out: the same weights give the
same bytes.
"""

import json
from collections.abc import Sequence

from tpjax.checkpoint.manifest import WEIGHTS, Weight

_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
_DICT = 2  # the kind of tree node that every key belongs to


def metadata(weights: Sequence[Weight]) -> dict[str, bytes]:
    """Name, relative to the checkpoint, -> content."""
    tree = {}
    for weight in weights:
        keys = weight.path.split(".")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": _DICT} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    about = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    step = {
        "item_handlers": _HANDLER,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": None,
        "commit_timestamp_nsecs": None,
        "custom_metadata": {},
    }
    return {
        f"{WEIGHTS}/_METADATA": json.dumps(about).encode(),
        f"{WEIGHTS}/_CHECKPOINT_METADATA": json.dumps(step).encode(),
    }
