"""The model families. Importing this package registers them all."""

from tpjax.models import llama as llama
from tpjax.models.registry import FAMILIES as FAMILIES
from tpjax.models.registry import Family as Family
from tpjax.models.registry import find as find
