"""The model families. Importing this package registers every file in it."""

import importlib
import pkgutil

from tpjax.models.registry import FAMILIES as FAMILIES
from tpjax.models.registry import Family as Family
from tpjax.models.registry import find as find

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
