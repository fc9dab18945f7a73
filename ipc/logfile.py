"""Where a process of a cluster writes its log: one file each, one line an event.

At `LOG_BYTES_MAX` the file loses its older half: a guest that attaches and leaves in a loop writes
lines into the hypervisor's log, but can't fill the disk.  It is cut where it is, and not renamed,
because a process in a jail (`ipc.jail`) can open no second file.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

LOG_BYTES_MAX: Final = 16 * 2**20


class LogFile(logging.Handler):
    """Appends to a file of bounded size that nobody else writes to."""

    def __init__(self, path: Path, bytes_max: int = LOG_BYTES_MAX) -> None:
        super().__init__()
        self._bytes_max = bytes_max
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)
        self._bytes = os.fstat(self._fd).st_size

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
            if self._bytes + len(line) > self._bytes_max:
                self._cut()
            self._bytes += os.write(self._fd, line)
        except (OSError, TypeError, ValueError):
            self.handleError(record)

    def _cut(self) -> None:
        """Keep whole lines of the newer half."""
        newer = os.pread(self._fd, self._bytes_max // 2, self._bytes - self._bytes_max // 2)
        os.ftruncate(self._fd, 0)
        self._bytes = os.write(self._fd, newer[newer.find(b"\n") + 1 :])

    def take_output(self) -> None:
        """What this process writes to standard output and error stands here from now on."""
        os.dup2(self._fd, 1)
        os.dup2(self._fd, 2)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()


def log_to(path: Path) -> LogFile:
    """Send this process's log to a file, which it shares with no other process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log_file = LogFile(path)
    logging.basicConfig(
        handlers=[log_file],
        level=logging.INFO,
        format="%(asctime)s.%(msecs)03d %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    return log_file
