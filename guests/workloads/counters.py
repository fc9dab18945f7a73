"""Add one to counters in a file that all nodes share, each time under a lock.

Parameters: path ("/counters"), counters (4), rounds (200), locks ("flock": the whole file, or
"ranges": the 8 bytes of one counter).  The file is made as long as needed.  Whoever adds reads the
old count first, so an addition is lost if two are at it at once: at the end the sum of all counters
is the sum of all guests' rounds, or the locks don't exclude.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final

from guests.workloads.job import BadParameters, Job

_COUNTER: Final = struct.Struct("<Q")


def run(job: Job) -> Iterator[None]:
    """Rounds on counters drawn by the seed."""
    path = job.text("path", "/counters")
    counters = job.count("counters", 4, 1, 10_000)
    job.total = job.count("rounds", 200, 0, 10_000_000)
    kind = job.text("locks", "flock")
    if kind not in ("flock", "ranges"):
        raise BadParameters("counters: parameter locks must be flock or ranges")
    yield
    handle = job.vfs.open(path, os.O_RDWR | os.O_CREAT)
    try:
        while job.done < job.total:
            place = job.random.randrange(counters) * _COUNTER.size
            while not _add(job, handle, place, kind):
                yield
            job.done += 1
            yield
    finally:
        job.vfs.close(handle)


def _add(job: Job, handle: int, place: int, kind: str) -> bool:
    """False when somebody else has the lock."""
    vfs = job.vfs
    try:
        if kind == "flock":
            vfs.flock(handle, fcntl.LOCK_EX)
        else:
            vfs.lock_range(handle, fcntl.F_WRLCK, place, _COUNTER.size)
    except BlockingIOError:
        return False
    try:
        old = vfs.pread(handle, _COUNTER.size, place).ljust(_COUNTER.size, b"\0")
        vfs.pwrite(handle, _COUNTER.pack(_COUNTER.unpack(old)[0] + 1), place)
    finally:
        vfs.flock(handle, fcntl.LOCK_UN)
        vfs.lock_range(handle, fcntl.F_UNLCK, place, _COUNTER.size)
    return True
