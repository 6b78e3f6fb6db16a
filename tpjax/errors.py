"""The errors a user can cause, each with the exit code its command ends with."""


class TpjaxError(Exception):
    """One clear line: what is wrong, where, and what to do about it."""

    exit_code = 5

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # a tensor's name may hold anything


class UsageError(TpjaxError, ValueError):
    """An argument that cannot be meant: fix the call."""

    exit_code = 2


class CheckpointError(TpjaxError, ValueError):
    """A model folder, config or weight file that cannot be used as it is."""

    exit_code = 3


class ResourceError(TpjaxError, RuntimeError):
    """More devices or more memory than there are."""

    exit_code = 4


class RunError(TpjaxError, RuntimeError):
    """Something failed while running, after everything had been checked."""

    exit_code = 5


def listing(items, limit: int = 8) -> str:
    """``a, b, c and 12 more``: long lists stay one readable line."""
    items = [str(item) for item in items]
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
