"""A file system on a damaged disk, used for all that it is good for.

Every step may be refused, but only as a file system refuses: with an error that a program on Linux
could get from it, never EIO while the disk does what it is asked.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from fs.vfs import Vfs

READ_BYTES_MAX: Final = 1 << 16

DOCUMENTED: Final = frozenset({
    errno.EBUSY, errno.EEXIST, errno.EFBIG, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.EMFILE,
    errno.EMLINK, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.ENOTEMPTY,
    errno.ENXIO, errno.EPERM, errno.EROFS, errno.ESTALE, errno.EUCLEAN,
})  # fmt: skip


def attempt(call: Callable[[], object]) -> None:
    """Run it; only `OSError` of a documented kind may come out."""
    try:
        call()
    except OSError as reason:
        assert reason.errno in DOCUMENTED, f"an undocumented error: {reason!r}"  # noqa: PT017


def used_hard(
    vfs: Vfs,
    known: Iterable[str] = (),
    *,
    paths_max: int | None = None,
    written_bytes: int = 70_000,
) -> None:
    """Read everything that can be read, then change and remove what can be.

    `known` are paths to use even if no walk finds them, `paths_max` says how many in all.
    """
    found = list(known)

    def walk() -> None:
        for path, directories, others in vfs.walk():
            found.extend(f"{path.rstrip('/')}/{name}" for name in directories + others)
            if paths_max is not None and len(found) > paths_max:
                return

    attempt(walk)
    found = list(dict.fromkeys(found))[:paths_max]
    for path in found:
        for read in (read_ends, Vfs.readlink, Vfs.listdir, Vfs.lstat):
            attempt(partial(read, vfs, path))
    for path in [*found, "/new/one", "/new/two"]:
        changes: tuple[Callable[[], object], ...] = (
            partial(vfs.mkdir, os.path.dirname(path)),  # noqa: PTH120
            partial(vfs.link, path, path + "-linked"),
            partial(vfs.rename, path, path + "-renamed"),
            partial(_append, vfs, path + "-renamed", written_bytes),
            partial(_append, vfs, path + "-new", written_bytes),
            partial(vfs.truncate, path + "-linked", 5),
            partial(vfs.unlink, path + "-renamed"),
            partial(vfs.rmdir, path + "-renamed"),
            partial(vfs.unlink, path + "-linked"),
        )
        for change in changes:
            attempt(change)


def read_ends(vfs: Vfs, path: str) -> None:
    """The first and the last bytes of a file."""
    handle = vfs.open(path)
    try:
        vfs.pread(handle, READ_BYTES_MAX, 0)
        size = vfs.fstat(handle).st_size
        vfs.pread(handle, READ_BYTES_MAX, max(0, size - READ_BYTES_MAX))
    finally:
        vfs.close(handle)


def _append(vfs: Vfs, path: str, size: int) -> None:
    handle = vfs.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        vfs.write(handle, b"x" * size)
    finally:
        vfs.close(handle)
