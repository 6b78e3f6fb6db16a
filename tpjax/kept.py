"""What one start has worked out and the next one need not: configs, and whole executables, which
are then neither traced nor compiled.

Everything is kept under a digest of all it depends on, tpjax's own source included. Who changes
tpjax while it runs, as some tests do, sets TPJAX_KEPT=0. A file appears whole or not at all, and a
damaged one is as good as none. Reading one runs it: the folder is the user's own, like XLA's cache.
"""

import contextlib
import functools
import os
import tempfile
from pathlib import Path

import xxhash

_HEAD = xxhash.xxh3_128().digest_size


def read(folder: Path | None, kind: str, about: object) -> bytes | None:
    """What is kept under this, None if there is nothing."""
    if folder is None:
        return None
    try:
        found = _file(folder, kind, about).read_bytes()
    except OSError:
        return None
    head, content = found[:_HEAD], found[_HEAD:]
    return content if xxhash.xxh3_128_digest(content) == head else None


def write(folder: Path | None, kind: str, about: object, content: bytes) -> None:
    """Keep it, where that can be: a full disk or a folder that cannot be written is no error."""
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, partial = tempfile.mkstemp(prefix=".partial-", dir=folder)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(xxhash.xxh3_128_digest(content))
                file.write(content)
            os.replace(partial, _file(folder, kind, about))
        except BaseException:
            os.unlink(partial)
            raise


def _file(folder: Path, kind: str, about: object) -> Path:
    return folder / f"{kind}-{xxhash.xxh3_128_hexdigest(repr((source(), about)).encode())}"


@functools.cache
def source() -> str:
    """A digest of tpjax's source, kernels included."""
    digest, root = xxhash.xxh3_128(), Path(__file__).parent
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cc", ".h")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
