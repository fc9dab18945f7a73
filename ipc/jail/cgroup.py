"""A limit for memory as the host counts it: control groups, version 2.

The group of a process is made by its starter, below the starter's own, and removed by it when the
process has ended.  That takes a hierarchy of version 2 with the memory controller, a group that the
starter may divide, and no process in that group itself (a group of version 2 has processes or
divided groups); where one is missing there is no such limit and `missing` says which.  Address
space (`limits`) bounds a process everywhere.

Version 1 is not used: its limits can't be had without root, and systems are leaving it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

_NAME: Final = "tmem-"
_SWAP_FILE: Final = "memory.swap.max"


class MemoryGroups:
    """Groups below that of this process; `mounts` and `own` are files of /proc/self."""

    def __init__(
        self,
        mounts: Path = Path("/proc/self/mounts"),
        own: Path = Path("/proc/self/cgroup"),
    ) -> None:
        self.missing: str | None = None
        self._parent = self._find(mounts, own)

    def _find(self, mounts: Path, own: Path) -> Path | None:
        root = _mounted(mounts)
        if root is None:
            self.missing = _words("no hierarchy of version 2 is mounted")
            return None
        lines = own.read_text().splitlines()
        place = next((line[3:] for line in lines if line.startswith("0::")), None)
        if place is None:
            self.missing = _words("this process is in no group of version 2")
            return None
        parent = root / place.lstrip("/")
        if "memory" not in _words_of(parent / "cgroup.controllers"):
            self.missing = _words(f"{root} has no memory controller")
        elif "memory" not in _words_of(parent / "cgroup.subtree_control"):
            self.missing = _words(f"{parent} does not hand its memory controller down")
        elif not os.access(parent, os.W_OK):
            self.missing = _words(f"{parent} may not be divided by this user")
        return parent if self.missing is None else None

    def make(self, name: str, memory_bytes: int) -> Path | None:
        """A group for one process, without swap of the host; None where there are none.

        Raises OSError.
        """
        if self._parent is None:
            return None
        group = self._parent / f"{_NAME}{name}"
        group.mkdir(exist_ok=True)
        (group / "memory.max").write_text(str(memory_bytes))
        with contextlib.suppress(FileNotFoundError):
            (group / _SWAP_FILE).write_text("0")
        return group


def enter(group: Path) -> None:
    """Move this process in.  Raises OSError."""
    (group / "cgroup.procs").write_text("0")


def remove(group: Path) -> bool:
    """Remove an empty group; False if it is not, or not there."""
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def _words(why: str) -> str:
    return f"a memory limit by cgroup ({why})"


def _mounted(mounts: Path) -> Path | None:
    with contextlib.suppress(OSError):
        for line in mounts.read_text().splitlines():
            fields = line.split()
            if len(fields) > 2 and fields[2] == "cgroup2":
                return Path(fields[1])
    return None


def _words_of(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
