"""What this machine can hold: one finding a limit, and the fix where it is too small.

A finding is `ok`, a `warning` (something is smaller than usual or a part is missing that only some
commands need) or `missing` (no cluster can run; the exit code is 69).
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ipc.errors import ExitCode, OperatorError
from ipc.jail import landlock, limits, seccomp
from ipc.jail.cgroup import MemoryGroups
from ipc.limits import explain_queue_limit, queue_bytes_needed, read_queue_limits
from ipc.mqueue import QueuePair
from ipc.names import Registry
from ipc.segment import SHARED_MEMORY_DIRECTORY, available_memory_bytes
from ipc.window import create_window
from tools.image import find_program
from tools.jails import IDS_FIRST
from tools.units import format_size

_GUESTS: Final = 4
_ARENA_BYTES: Final = 32 * 2**20
_MEMORY_BYTES: Final = 512 * 2**20
_DISK_BYTES: Final = 512 * 2**20
_FILES: Final = 256


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, how bad it is and what to do."""

    subject: str
    found: str
    state: str
    fix: str = ""


def examine() -> list[Finding]:
    """Findings about this machine; makes and removes the queues of one guest."""
    looks: list[Callable[[], Finding]] = [
        _python,
        _queues,
        _queue_now,
        _shared_memory,
        _memory,
        _disk,
        _files,
        _peer_pidfd,
        _jail_files,
        _jail_calls,
        _jail_users,
        _jail_memory,
        lambda: _program("mke2fs", "images can't be made", "missing"),
        lambda: _program("e2fsck", "images can't be checked", "warning"),
        lambda: _program("debugfs", "tests of the file system are skipped", "warning"),
        _assertions,
    ]
    return [look() for look in looks]


def exit_code(findings: list[Finding]) -> ExitCode:
    """UNAVAILABLE if something needed is missing."""
    missing = any(finding.state == "missing" for finding in findings)
    return ExitCode.UNAVAILABLE if missing else ExitCode.OK


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Finding("python", version, "ok")


def _queues() -> Finding:
    limits = read_queue_limits()
    found = (
        f"{limits.guests_max} guests fit (RLIMIT_MSGQUEUE {_limit(limits.rlimit_bytes)} bytes of "
        f"{queue_bytes_needed(1)} a guest, queues_max {_limit(limits.queues_max)})"
    )
    reason = explain_queue_limit(_GUESTS, limits)
    if reason is not None:
        return Finding("message queues", found, "missing", reason)
    return Finding("message queues", found, "ok")


def _queue_now() -> Finding:
    """Limits say what fits an empty machine; this says whether a guest's queues can be had now."""
    with tempfile.TemporaryDirectory(prefix="tmem-doctor-") as folder:
        try:
            pair = QueuePair("doctor", Registry(Path(folder)), create_window(), os.urandom)
        except OperatorError as error:
            fix = "end other users of queues, or run 'tmem clean'"
            return Finding("a guest's queues", str(error), "missing", fix)
        pair.close()
    return Finding("a guest's queues", "made and removed", "ok")


def _shared_memory() -> Finding:
    try:
        status = os.statvfs(SHARED_MEMORY_DIRECTORY)
    except OSError as error:
        return Finding("/dev/shm", error.strerror or "?", "missing", "mount a tmpfs on it")
    room = status.f_bavail * status.f_frsize
    found = f"{format_size(room)} free of {format_size(status.f_blocks * status.f_frsize)}"
    if room < _ARENA_BYTES:
        fix = "mount -o remount,size=1G /dev/shm (in a container: --shm-size=1g)"
        return Finding("/dev/shm", found, "missing", fix)
    return Finding("/dev/shm", found, "ok")


def _memory() -> Finding:
    available = available_memory_bytes()
    if available is None:
        return Finding("free memory", "unknown", "warning", "mount /proc")
    found = f"{format_size(available)} available"
    if available < _MEMORY_BYTES:
        return Finding("free memory", found, "warning", "end other programs, or use --topo pair")
    return Finding("free memory", found, "ok")


def _disk() -> Finding:
    status = os.statvfs(Path.cwd())
    room = status.f_bavail * status.f_frsize
    found = f"{format_size(room)} free here, for ./runs"
    if room < _DISK_BYTES:
        return Finding("disk", found, "warning", "images take 300 MB; go to another folder")
    return Finding("disk", found, "ok")


def _files() -> Finding:
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _FILES:
        return Finding("open files", str(soft), "warning", "ulimit -n 1024")
    return Finding("open files", _limit(soft), "ok")


def _peer_pidfd() -> Finding:
    release = os.uname().release
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if version < (5, 3):
        return Finding("kernel", release, "missing", "pidfd_open(2) needs Linux 5.3 or newer")
    return Finding("kernel", release, "ok")


def _jail_files() -> Finding:
    level = landlock.level()
    missing = landlock.missing(level)
    if missing is not None:
        fix = "as it says; until then guests are jailed without, and --jail strict does not start"
        return Finding("jail: files", f"no {missing}", "warning", fix)
    later = landlock.second_locks_missing(level)
    less = f", without {', '.join(later)}" if later else ""
    return Finding("jail: files", f"Landlock, level {level}{less}", "ok")


def _jail_calls() -> Finding:
    missing = seccomp.missing()
    if missing is not None:
        fix = "guests are jailed without it; --jail strict does not start"
        return Finding("jail: system calls", f"no {missing}", "warning", fix)
    return Finding("jail: system calls", "filtered by seccomp", "ok")


def _jail_users() -> Finding:
    refusal = limits.can_give_ids(IDS_FIRST)
    if refusal is None:
        return Finding("jail: user ids", "one for each guest", "ok")
    return Finding("jail: user ids", f"without {refusal}", "ok" if os.geteuid() else "warning")


def _jail_memory() -> Finding:
    missing = MemoryGroups().missing
    if missing is None:
        return Finding("jail: memory", "by address space and by cgroup", "ok")
    return Finding("jail: memory", f"by address space, without {missing}", "ok")


def _program(name: str, loss: str, state: str) -> Finding:
    path = find_program(name)
    if path is None:
        return Finding(name, f"not found: {loss}", state, "install the package e2fsprogs")
    return Finding(name, path, "ok")


def _assertions() -> Finding:
    if not __debug__:
        fix = "run Python without -O; assertions find our own bugs before they do harm"
        return Finding("assertions", "off", "missing", fix)
    return Finding("assertions", "on", "ok")


def _limit(value: int) -> str:
    return "unlimited" if value < 0 else str(value)
