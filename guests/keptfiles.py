"""Small files of the host that a guest reads again and again, though its jail lets it open none.

`hold` opens them while that is possible.  What the kernel makes up when it is read (/proc) is made
up anew for each read from the start.  Without `hold` a file is opened each time.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

OWN_IO: Final = "/proc/self/io"
OWN_MERGING: Final = "/proc/self/ksm_stat"
MERGING: Final = "/sys/kernel/mm/ksm/run"
_BYTES_MAX: Final = 65536

_held: dict[str, int] = {}


def hold() -> None:
    """Open them all, for as long as this process lives; one that is not there stays unread."""
    for path in (OWN_IO, OWN_MERGING, MERGING):
        with contextlib.suppress(OSError):
            _held[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def read_text(path: str) -> str:
    """The text as it is now.  OSError."""
    fd = _held.get(path)
    return Path(path).read_text() if fd is None else os.pread(fd, _BYTES_MAX, 0).decode()
