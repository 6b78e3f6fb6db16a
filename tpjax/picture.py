"""Pictures on disk: matplotlib draws them, the extra ``plot``."""

import importlib.util
import os
from pathlib import Path

from tpjax.errors import ResourceError, UsageError

KINDS = (".png", ".svg", ".pdf")


def check(file: Path) -> None:
    """Raises UsageError for another kind of file, ResourceError without matplotlib or without a
    folder to write to: before the work, not after."""
    if file.suffix not in KINDS:
        raise UsageError(f"--plot {file}: write one of {', '.join(KINDS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ResourceError('--plot: matplotlib is not installed; pip install "tpjax[plot]"')
    if not file.absolute().parent.is_dir():
        raise ResourceError(f"--plot {file}: No such file or directory")


def save(figure, file: Path) -> None:
    """Write it; the file appears whole or not at all. Raises ResourceError where it cannot be."""
    partial = file.with_name(f".{file.name}.partial{file.suffix}")
    try:
        figure.savefig(partial)
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ResourceError(f"--plot {file}: {error.strerror or error}") from error
