"""The disk of the run directory, filled up.

Tries: make files there, and make those larger that it has open: its disk, its log; take blocks
behind their ends, which makes them no longer.

Stopped by: the jail: no file can be made or opened, none can be longer than the guest's own disk
is, or than a bound (RLIMIT_FSIZE), and blocks are had by writing only (no fallocate).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from guests.adversaries.objectnames import refuse
from guests.adversary import Cell
from ipc.jail.syscalls import call

_DESCRIPTORS = 256
_KEEP_SIZE = 1
_BLOCKS_BYTES = 64 << 20


def run(cell: Cell) -> Iterator[None]:
    """Parameters: folder, size_bytes (it stops there; files are sparse, and cut off again)."""
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    folder, size_bytes = cell.text("folder"), cell.count("size_bytes", 1 << 30, 1, 1 << 40)
    path = f"{folder}/rubbish"
    yield
    try:
        fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    except OSError as error:
        refuse(cell, error)
    else:
        os.close(fd)
        Path(path).unlink()
        report["attempts"] += 1
        report["succeeded"] += 1
    yield
    for fd in range(3, _DESCRIPTORS):
        try:
            found = os.fstat(fd)
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            yield from _grow(cell, fd, found.st_size, size_bytes)


def _grow(cell: Cell, fd: int, before_bytes: int, size_bytes: int) -> Iterator[None]:
    for grow in (
        lambda: os.ftruncate(fd, size_bytes),
        lambda: os.pwrite(fd, b"x", size_bytes - 1),
    ):
        try:
            grow()
        except OSError as error:
            # A file that is open for reading, or of /proc, is none to grow.
            if error.errno not in (errno.EBADF, errno.EINVAL, errno.ESPIPE):
                refuse(cell, error)
            continue
        # Where a file is only appended to, the byte stands at the end.
        grown = os.fstat(fd).st_size >= size_bytes
        with contextlib.suppress(OSError):
            os.ftruncate(fd, before_bytes)
        if grown:
            cell.report["attempts"] += 1
            cell.report["succeeded"] += 1
        yield
    try:
        call("fallocate", fd, _KEEP_SIZE, before_bytes, min(size_bytes, _BLOCKS_BYTES))
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP):
            refuse(cell, error)
    else:
        os.ftruncate(fd, before_bytes)
        cell.report["attempts"] += 1
        cell.report["succeeded"] += 1
    yield
