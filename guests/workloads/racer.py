"""What one node does in a race: calls that may fail as the race has it, writes that prove that they
are whole, and the record of it all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from typing import IO, Any, Final, TypeVar

from guests.workloads.job import Job

RECORD_BYTES: Final = 96
"""Of a log: no divisor of a page, so that records lie across pages."""
LOG_BYTES_MAX: Final = 2**24
_HEAD: Final = struct.Struct("<16sQI")
_FATAL: Final = (errno.EIO, errno.EROFS, errno.EUCLEAN, errno.ENOSPC)

Result = TypeVar("Result")


def pack(who: str, number: int, size: int) -> bytes:
    """What `who` writes as its write of this number: head, filling and checksum in `size` bytes."""
    filling = bytes([zlib.crc32(f"{who} {number}".encode()) % 255 + 1]) * (size - _HEAD.size)
    return _HEAD.pack(who.encode(), number, zlib.crc32(filling)) + filling


def unpack(data: bytes) -> tuple[str, int] | None:
    """Whose write of which number this is; None when it is no whole one."""
    if len(data) < _HEAD.size:
        return None
    who = data[:16].rstrip(b"\0").decode("ascii", "replace")
    number = _HEAD.unpack_from(data)[1]
    return (who, number) if who and data == pack(who, number, len(data)) else None


def read_log(data: bytes) -> list[tuple[str, int] | None]:
    """The records of a log; None for one that is not whole."""
    return [
        unpack(data[start : start + RECORD_BYTES]) for start in range(0, len(data), RECORD_BYTES)
    ]


class Racer:
    """One node's part in a race."""

    def __init__(self, job: Job, record: IO[str]) -> None:
        self.vfs = job.vfs
        self.random = job.random
        self.who = job.text("who")
        self.cutter = bool(job.count("cutter", 0, 0, 1))
        self.operations = job.count("operations", 100, 0, 1_000_000)
        self._job = job
        self._record = record

    def say(self, at: str, call: str, path: str, **facts: Any) -> None:
        """A line of the record."""
        line = {"at": at, "call": call, "path": path, "ns": time.monotonic_ns(), **facts}
        self._record.write(json.dumps(line) + "\n")

    def attempt(
        self,
        call: str,
        path: str,
        act: Callable[[], Result],
        *allowed: int,
        **facts: Any,
    ) -> Result | None:
        """Do it and say so; None when it failed for a reason that is allowed, or not.

        A failure that no race explains is a mismatch; one that makes going on senseless is raised.
        """
        self.say("begin", call, path, **facts)
        try:
            result = act()
        except OSError as reason:
            name = errno.errorcode.get(reason.errno or 0, str(reason))
            self.say("end", call, path, error=name, **facts)
            if reason.errno not in allowed:
                self.wrong(f"{call} {path}: {reason}")
                if reason.errno in _FATAL:
                    raise
            return None
        self.say("end", call, path, error=None, **facts)
        return result

    def wrong(self, text: str) -> None:
        """Something that no order of calls explains."""
        self.say("wrong", text, "")
        self._job.findings.mismatch(text)

    def done(self) -> None:
        """One operation more."""
        self._job.done += 1

    def make(self, path: str, number: int, size: int, *allowed: int) -> int | None:
        """A new file with one write of `size` bytes in it, open."""
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        handle = self.attempt("create", path, lambda: self.vfs.open(path, flags), *allowed)
        if handle is not None and size:
            self.put(handle, path, number, size)
        return handle

    def put(self, handle: int, path: str, number: int, size: int) -> None:
        """Write at the beginning."""
        data = pack(self.who, number, size)
        if self.attempt("write", path, lambda: self.vfs.pwrite(handle, data, 0)) not in (
            None,
            size,
        ):
            self.wrong(f"{path}: a short write")

    def names(self, folder: str) -> list[str]:
        """The names in a folder that may be gone."""
        with contextlib.suppress(FileNotFoundError):
            return self.vfs.listdir(folder)
        return []
