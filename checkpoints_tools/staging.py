"""A folder that appears whole or not at all.

All work happens in ``DST.partial``: a lock that keeps a second process away, a journal that says
which weights are done, the new folder, and at the end for a moment the old one. Nothing in there is
``DST`` before one rename makes it so. The lock is the kernel's, so a killed process leaves none
behind; its file is also the sign that the folder is this tool's to empty.
"""

import errno
import fcntl
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tpjax.checkpoint.manifest import JOURNAL, MANIFEST
from tpjax.errors import CheckpointError, ResourceError, RunError, UsageError, listing

LOCK = ".tpjax-lock"
_NEW, _OLD = "new", "old"


class Staging:
    """The unfinished folder, ``path``, and the work folder around it, locked. Use `stage`."""

    def __init__(self, dst: Path, lock: int):
        self.dst, self._work, self._lock = dst, partial_of(dst), lock
        self.path = self._work / _NEW
        self.about: dict = {}
        self._journal: int | None = None
        self._gone = False
        self._writing = threading.Lock()

    def start(self, about: dict, resume: bool) -> list[dict]:
        """The journal's records, if it was begun by a run that was ``about`` the same thing.

        Without ``resume``, whatever is there goes. Raises CheckpointError if a resumed run would
        not go on with what was begun.
        """
        self.about = about
        journal = self._work / JOURNAL
        lines, whole = _whole_lines(journal) if resume else ([], 0)
        if lines:
            self._compare(lines[0], about)
        else:
            self.clear()
        with named(journal):
            self.path.mkdir(exist_ok=True)
            self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._journal, whole)
        if not lines:
            self.record(about)
        return lines[1:]

    def _compare(self, begun: dict, about: dict) -> None:
        changed = [f for f, of in begun.get("files", {}).items() if about["files"].get(f) != of]
        if changed:
            raise CheckpointError(
                f"{self._work}: the source has changed since this conversion began:"
                f" {listing(changed, 3)}; --overwrite starts again"
            )
        other = [word for word in about if begun.get(word) != about[word]]
        if other:
            raise UsageError(
                f"{self._work}: begun with another {listing(other)}; give the same, or --overwrite"
                " to start again"
            )

    def record(self, record: dict) -> None:
        """One line, on disk before this returns."""
        line = json.dumps(record).encode() + b"\n"
        assert self._journal is not None
        with self._writing, named(self._work / JOURNAL):
            while line:
                line = line[os.write(self._journal, line) :]
            os.fsync(self._journal)

    def clear(self) -> None:
        """Forget what an earlier run has begun."""
        with named(self.path):
            # In this order: at no moment could what is left pass for something finished.
            (self.path / MANIFEST).unlink(missing_ok=True)
            if self.path.exists():
                shutil.rmtree(self.path)
            (self._work / JOURNAL).unlink(missing_ok=True)
            self.path.mkdir()

    def write(self, name: str, content: bytes) -> None:
        """A small file, whole or not at all, and on disk before this returns."""
        path = self.path / name
        part = path.with_name(path.name + ".tmp")
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)

    def complete(self) -> bool:
        """Whether nothing is missing but the renaming."""
        return (self.path / MANIFEST).exists()

    def commit(self, replace: bool = False) -> None:
        """Rename to the final name; with ``replace`` in the place of a checkpoint that is there,
        which is removed. Raises UsageError if something else has appeared there meanwhile."""
        check_dst(self.dst)
        if not replace and self.dst.exists() and any(self.dst.iterdir()):
            raise UsageError(
                f"{self.dst}: has appeared since this began; --overwrite replaces a checkpoint"
            )
        taken = {path.name for path in _olds(self._work)}
        old = self._work / next(n for i in itertools.count() if (n := f"{_OLD}-{i}") not in taken)
        with named(self.dst):
            for folder, _, _ in os.walk(self.path):
                sync_folder(Path(folder))
            replaces = self.dst.exists() and any(self.dst.iterdir())
            if replaces:
                self.dst.rename(old)
            try:
                self.path.rename(self.dst)
            except OSError:
                if replaces:
                    old.rename(self.dst)
                raise
            sync_folder(self.dst.parent)
        self.remove()

    def remove(self) -> None:
        """The work folder, once nothing in it is needed any more. The lock goes last: whoever waits
        for it sees that its file has gone, and looks again."""
        self._gone = True
        with suppress(OSError):  # what cannot be removed stays, with the lock that marks it as ours
            for folder in (self.path, *_olds(self._work)):
                shutil.rmtree(folder, ignore_errors=True)
            (self._work / JOURNAL).unlink(missing_ok=True)
            if [entry.name for entry in self._work.iterdir()] == [LOCK]:
                (self._work / LOCK).unlink()
                self._work.rmdir()

    def close(self) -> None:
        """Give the lock back; the work folder stays only if it holds something done."""
        try:
            if self._journal is not None:
                os.close(self._journal)
            if not self._gone:  # else another process may be in a folder of the same name
                begun = len(_whole_lines(self._work / JOURNAL)[0]) > 1
                if not begun and not _olds(self._work):
                    self.remove()
        finally:
            os.close(self._lock)


@contextmanager
def stage(dst: Path) -> Iterator[Staging]:
    """The staging folder of ``dst``, for this process alone. Raises ResourceError if another one
    has it, UsageError if its place is taken by something else."""
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
    if real.is_relative_to(partial_of(target)):
        raise UsageError(f"{dst}: its work folder would be the source {src}; give another folder")


def check_dst(dst: Path) -> None:
    """Refuse a place where nothing can appear by a rename, or where something is that this tool did
    not make: told before anything is read."""
    for path in dst.parents:
        if path.exists() and not path.is_dir():
            raise UsageError(f"{dst}: cannot be made, {path} is a file; give another folder")
    if len(os.fsencode(partial_of(dst).name)) > 255:
        raise UsageError(f"{dst}: the name is too long; give a shorter one")
    if dst.exists() and not dst.is_dir():
        raise UsageError(f"{dst}: a file; give a new folder")
    if os.path.ismount(dst):
        raise UsageError(
            f"{dst}: a mount point, which nothing can be renamed to; give a folder in it"
        )
    if not dst.is_dir() or not any(dst.iterdir()):
        return
    if not (dst / MANIFEST).is_file():
        raise UsageError(f"{dst}: not empty, and no tpjax checkpoint; give a new folder")


def check_space(dst: Path, needed: int) -> None:
    """Raise ResourceError unless so many bytes, and some for small files, are free."""
    needed += 64 << 20
    free = shutil.disk_usage(dst.parent if dst.parent.exists() else "/").free
    if needed > free:
        raise ResourceError(
            f"{dst.parent}: {needed / 1e9:.2f} GB more are needed, {free / 1e9:.2f} GB are free"
        )


def foreign(dst: Path, known: Iterable[str]) -> list[str]:
    """What lies in a checkpoint and does not belong to it."""
    ours = {name.split("/")[0] for name in known} | {MANIFEST}
    return sorted(path.name for path in dst.iterdir() if path.name not in ours)


def partial_of(dst: Path) -> Path:
    """The work folder of ``dst``."""
    return dst.with_name(dst.name + ".partial")


def is_partial(dst: Path) -> bool:
    """Whether a conversion to ``dst`` was begun and has something done."""
    return (partial_of(dst) / JOURNAL).exists()


def _locked(dst: Path) -> int:
    work = partial_of(dst)
    path = work / LOCK
    while True:
        with named(path):
            work.parent.mkdir(parents=True, exist_ok=True)
            try:
                work.mkdir()
            except FileExistsError as error:
                if not work.is_dir() or (any(work.iterdir()) and not path.exists()):
                    raise UsageError(
                        f"{work}: in the way, and not this tool's; move it, or give another folder"
                    ) from error
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # renamed in between
                continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino == os.stat(path).st_ino:
                with suppress(OSError):  # the number is only told to others
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
    """Undo or clear up what a kill between the renames of a replacement has left."""
    for old in _olds(partial_of(dst)):
        there = dst.exists() and any(dst.iterdir())
        if there or not (old / MANIFEST).exists():
            shutil.rmtree(old, ignore_errors=True)
        elif not (partial_of(dst) / _NEW / MANIFEST).exists():
            old.rename(dst)


def _olds(work: Path) -> list[Path]:
    """Checkpoints that were set aside; all but one are on their way out."""
    return sorted(work.glob(f"{_OLD}*"))


def _whole_lines(journal: Path) -> tuple[list[dict], int]:
    """The records, and how many bytes they take: a last one may have been cut off by a kill."""
    lines, whole = [], 0
    if not journal.exists():
        return lines, whole
    for line in journal.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not line.endswith(b"\n"):
            break
        lines.append(record)
        whole += len(line)
    return lines, whole


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
                f"{path}: no space left; free some and run it again (convert with --resume goes on)"
            ) from error
        raise RunError(f"{path}: {error.strerror or error}") from error
