"""Names of kernel objects, and the registry that makes sure none is left behind.

A cluster's *run directory* holds `registry/`, one empty file per kernel object or process:

    segment:NAME    queue:NAME    process:PID:START    group:PATH

An entry is made before the object and removed after it is gone, so whatever was killed in between
is listed and `clean` can remove it: by the registry, never by guessing from a process's name.
PATH is that of a control group, with its slashes as %2F.
START is the process's start time in clock ticks (field 22 of /proc/PID/stat), so that a process
id that was used again is left alone.

POSIX names are /tmem-<cluster>-<kind>-<16 random hex digits>; guests can't guess one another's.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import posix_ipc

from ipc.jail.cgroup import remove

NAME_PREFIX = "tmem-"


def object_name(cluster: str, kind: str, random_bytes: Callable[[int], bytes]) -> str:
    """A fresh POSIX object name; `random_bytes` is os.urandom or a seeded stand-in."""
    return f"/{NAME_PREFIX}{cluster}-{kind}-{random_bytes(8).hex()}"


def process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, or None if there is none (or a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command name may hold spaces and parentheses; fields go on after the last one.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


class Leftover(NamedTuple):
    """A registry entry: kind `segment`, `queue`, `process` or `group`, and what is behind it."""

    kind: str
    name: str


class Registry:
    """The registry of one run directory; safe to use from several processes."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory / "registry"
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add(self, kind: str, name: str) -> None:
        (self._directory / f"{kind}:{name.lstrip('/')}").touch(mode=0o600)

    def remove(self, kind: str, name: str) -> None:
        (self._directory / f"{kind}:{name.lstrip('/')}").unlink(missing_ok=True)

    def add_process(self, pid: int) -> None:
        start = process_start(pid)
        if start is not None:
            self.add("process", f"{pid}:{start}")

    def remove_process(self, pid: int) -> None:
        for entry in self._directory.glob(f"process:{pid}:*"):
            entry.unlink(missing_ok=True)

    def entries(self) -> Iterator[Leftover]:
        """All entries, processes first: an object of a living process is not a leftover yet."""
        names = sorted(os.listdir(self._directory))
        for name in sorted(names, key=lambda name: not name.startswith("process:")):
            kind, _, rest = name.partition(":")
            yield Leftover(kind, rest)

    def clean(self) -> list[Leftover]:
        """Kill what is registered and still the same process, unlink the rest; what was found."""
        found = []
        for entry in list(self.entries()):
            if entry.kind == "process":
                existed = _kill(entry.name)
            elif entry.kind == "queue":
                existed = unlink_queue(f"/{entry.name}")
            elif entry.kind == "group":
                existed = remove(Path(unquote(entry.name)))
            else:
                existed = unlink_segment(f"/{entry.name}")
            self.remove(entry.kind, entry.name)
            if existed:
                found.append(entry)
        return found


def unlink_queue(name: str) -> bool:
    """Remove a queue's name; False if it has none."""
    try:
        posix_ipc.unlink_message_queue(name)
    except posix_ipc.ExistentialError:
        return False
    return True


def unlink_segment(name: str) -> bool:
    """Remove a segment's name; False if it has none."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        return False
    return True


def _kill(name: str) -> bool:
    pid, _, start = name.partition(":")
    if process_start(int(pid)) != int(start):
        return False
    # A pidfd taken now and a second look at the start time leave no room for a reused id.
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(int(pid))
        try:
            if process_start(int(pid)) == int(start):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                return True
        finally:
            os.close(pidfd)
    return False
