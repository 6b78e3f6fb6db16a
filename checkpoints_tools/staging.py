"""A folder that appears whole or not at all.

Everything is written to ``DST.partial`` and renamed to ``DST`` at the very end. A lock in it keeps
a second process away; a journal in it says which weights are done, for a resumed run. The lock is
the kernel's, so a killed process leaves none behind.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpjax.checkpoint.manifest import JOURNAL, MANIFEST
from tpjax.errors import CheckpointError, ResourceError, RunError, UsageError, listing

LOCK = ".lock"


class Staging:
    """The unfinished folder, locked. Use `stage`."""

    def __init__(self, dst: Path, lock: int):
        self.dst, self.path, self._lock = dst, partial_of(dst), lock
        self.about: dict = {}
        self._journal: int | None = None
        self._writing = threading.Lock()

    def start(self, about: dict, resume: bool) -> list[dict]:
        """The journal's records, if it was begun by a run that was ``about`` the same thing.

        Without ``resume``, whatever is there goes. Raises CheckpointError if a resumed run would
        not go on with what was begun.
        """
        self.about = about
        if not resume:
            self.clear()
        journal = self.path / JOURNAL
        lines = _whole_lines(journal) if journal.exists() else []
        if lines:
            self._compare(lines[0], about)
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if not lines:
            os.ftruncate(self._journal, 0)
            self.record(about)
        return lines[1:]

    def _compare(self, begun: dict, about: dict) -> None:
        changed = [f for f, of in begun.get("files", {}).items() if about["files"].get(f) != of]
        if changed:
            raise CheckpointError(
                f"{self.path}: the source has changed since this conversion began:"
                f" {listing(changed, 3)}; --overwrite starts again"
            )
        other = [word for word in about if begun.get(word) != about[word]]
        if other:
            raise UsageError(
                f"{self.path}: begun with another {listing(other)}; give the same, or --overwrite"
                " to start again"
            )

    def record(self, record: dict) -> None:
        """One line, on disk before this returns."""
        line = json.dumps(record).encode() + b"\n"
        assert self._journal is not None
        with self._writing, named(self.path / JOURNAL):
            os.write(self._journal, line)
            os.fsync(self._journal)

    def clear(self) -> None:
        """Remove everything but the lock."""
        for entry in self.path.iterdir():
            if entry.name == LOCK:
                continue
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def write(self, name: str, content: bytes) -> None:
        """A small file, on disk before this returns."""
        path = self.path / name
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def commit(self) -> None:
        """Rename to the final name, in the place of a checkpoint that is there."""
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        (self.path / JOURNAL).unlink(missing_ok=True)
        for folder, _, _ in os.walk(self.path):
            sync_folder(Path(folder))
        replaced = replaced_of(self.dst)
        with named(self.dst):
            if self.dst.exists() and any(self.dst.iterdir()):
                self.dst.rename(replaced)
            # Whoever waits for the lock sees that its file has gone, and looks again.
            (self.path / LOCK).unlink()
            self.path.rename(self.dst)
            sync_folder(self.dst.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def close(self) -> None:
        """Give the lock back; an unfinished folder stays only if it holds something done."""
        if self._journal is not None:
            os.close(self._journal)
        journal = self.path / JOURNAL
        if self.path.exists() and (not journal.exists() or len(_whole_lines(journal)) < 2):
            if not (self.path / MANIFEST).exists():
                shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


@contextmanager
def stage(dst: Path) -> Iterator[Staging]:
    """The staging folder of ``dst``, for this process alone. Raises ResourceError if another one
    has it."""
    staging = Staging(dst, _locked(dst))
    try:
        _repair(dst)
        yield staging
    finally:
        staging.close()


def check_places(src: Path, dst: Path) -> None:
    """Refuse to write where something is that this tool did not make."""
    real, target = src.resolve(), dst.resolve()
    if target.is_relative_to(real) or real.is_relative_to(target):
        raise UsageError(f"{dst}: inside the source {src}, or around it; give another folder")
    if dst.is_dir() and any(dst.iterdir()) and not (dst / MANIFEST).is_file():
        raise UsageError(f"{dst}: not empty, and no tpjax checkpoint; give a new folder")
    if dst.exists() and not dst.is_dir():
        raise UsageError(f"{dst}: a file; give a new folder")


def partial_of(dst: Path) -> Path:
    return dst.with_name(dst.name + ".partial")


def replaced_of(dst: Path) -> Path:
    return dst.with_name(dst.name + ".replaced")


def _locked(dst: Path) -> int:
    path = partial_of(dst) / LOCK
    while True:
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # renamed in between
                continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino == os.stat(path).st_ino:
                os.ftruncate(lock, 0)
                os.write(lock, str(os.getpid()).encode())
                return lock
        except BlockingIOError as error:
            owner = os.read(lock, 20).decode() or "unknown"
            os.close(lock)
            raise ResourceError(
                f"{dst}: another process (number {owner}) is writing it; wait for it, or give"
                " another folder"
            ) from error
        except FileNotFoundError:  # the other process has finished since
            pass
        except OSError as error:
            os.close(lock)
            raise RunError(f"{path}: cannot be locked here ({error.strerror})") from error
        os.close(lock)


def _repair(dst: Path) -> None:
    """Undo or finish what a kill between the renames of a replacement has left."""
    replaced = replaced_of(dst)
    if not replaced.exists():
        return
    if dst.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif not (partial_of(dst) / MANIFEST).exists():
        replaced.rename(dst)


def _whole_lines(journal: Path) -> list[dict]:
    """The records, without a last one that was cut off by a kill."""
    lines = []
    for line in journal.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def sync_folder(path: Path) -> None:
    """Names in a folder last only once the folder itself is on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:  # some network file systems refuse it, and need no such thing
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(fd)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What a file system says while something is written there, as one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{path}: no space left; free some, then --resume goes on from here"
            ) from error
        raise RunError(f"{path}: {error.strerror or error}") from error
