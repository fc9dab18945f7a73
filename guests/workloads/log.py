"""Write a log as a service does: append, fsync, rotate by renaming, read back what was kept.

Parameters: lines (2000), rotate_bytes (65536), keep (4), fsync_lines (100), directory ("/log").
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import closing

from fs.errors import error
from guests.workloads.job import Job
from guests.workloads.verify import read_verified


class RotatingLog:
    """`current` and `log.1` (newest) to `log.<keep>`; knows what each must hold."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._directory = "/" + job.text("directory", "/log").strip("/")
        self._rotate_bytes = job.count("rotate_bytes", 65536, 1, 1 << 24)
        self._keep = job.count("keep", 4, 1, 100)
        self._fsync_lines = job.count("fsync_lines", 100, 1, 1_000_000)
        self._current = f"{self._directory}/current"
        self._content = hashlib.sha256()
        self._size = 0
        self._lines = 0
        self._rotated: list[str] = []
        self._handle = self._begin()

    def _begin(self) -> int:
        """A fresh log; files of an earlier run are removed."""
        vfs = self._job.vfs
        try:
            names = vfs.listdir(self._directory)
        except FileNotFoundError:
            vfs.mkdir(self._directory)
            names = []
        for name in names:
            if name == "current" or name.startswith("log."):
                vfs.unlink(f"{self._directory}/{name}")
        return self._open()

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        return self._job.vfs.open(self._current, flags)

    def append(self, text: str) -> Iterator[None]:
        """Write a line; now and then make it durable, now and then rotate."""
        line = text.encode() + b"\n"
        written = self._job.vfs.write(self._handle, line)
        self._content.update(line[:written])
        self._size += written
        if written < len(line):
            raise error(errno.ENOSPC, self._current)
        self._lines += 1
        self._job.findings.log_lines += 1
        if self._lines % self._fsync_lines == 0:
            self._job.vfs.fsync(self._handle)
        if self._size >= self._rotate_bytes:
            yield from self._rotate()
        yield

    def _rotate(self) -> Iterator[None]:
        vfs = self._job.vfs
        vfs.fsync(self._handle)
        self.close()
        self._rotated.insert(0, self._content.hexdigest())
        for number in range(len(self._rotated), 1, -1):
            if number > self._keep:
                vfs.unlink(self._name(number - 1))
            else:
                vfs.rename(self._name(number - 1), self._name(number))
        del self._rotated[self._keep :]
        vfs.rename(self._current, self._name(1))
        self._handle = self._open()
        self._content = hashlib.sha256()
        self._size = 0
        # The oldest has left memory if anything has.
        yield from read_verified(self._job, self._name(len(self._rotated)), self._rotated[-1])

    def _name(self, number: int) -> str:
        return f"{self._directory}/log.{number}"

    def close(self) -> None:
        """Close the current log; twice is once.  An open file keeps its space."""
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            self._job.vfs.close(handle)

    def finish(self) -> Iterator[None]:
        """Close, and verify everything that was kept."""
        self._job.vfs.fsync(self._handle)
        self.close()
        yield from read_verified(self._job, self._current, self._content.hexdigest())
        for number, digest in enumerate(self._rotated, 1):
            yield from read_verified(self._job, self._name(number), digest)


def line_of(job: Job, number: int) -> str:
    """A line of 40 to about 160 characters, from the seed."""
    words = " ".join(f"{job.random.getrandbits(32):08x}" for _ in range(job.random.randint(3, 16)))
    return f"{number:08d} event={words}"


def run(job: Job) -> Iterator[None]:
    """Write `lines` lines, then read everything back."""
    job.total = job.count("lines", 2000, 1, 10_000_000)
    with closing(RotatingLog(job)) as log:
        for number in range(job.total):
            yield from log.append(line_of(job, number))
            job.done += 1
        yield from log.finish()
