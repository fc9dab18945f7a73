"""What this pytest process holds of the kernel: segments, queues, file descriptors, processes.

Only this process's own objects are looked at: segments and queues by the prefix that `cluster_name`
gives every name, so that parallel workers and other runs on the machine can be told apart.

Listing queues needs an mqueue file system. As root one is made that is attached to no directory
(fsopen and fsmount, Linux 5.2), so nothing is left to unmount however this process ends. Without
the right to do that, the registries in a test's run directories say which queue names to try.
"""

import ctypes
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import posix_ipc

from ipc.names import NAME_PREFIX, unlink_queue, unlink_segment

# From linux/unistd.h, the same on every machine; C libraries before glibc 2.36 don't wrap them.
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_FSCONFIG_CMD_CREATE = 6
_CLOEXEC = 1
_PR_SET_CHILD_SUBREAPER = 36

# How long a process may take to go after its test let go of it.
_EXIT_GRACE_SECONDS = 3.0

_libc = ctypes.CDLL(None, use_errno=True)

WORKER_CLUSTERS = f"t{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-{os.getpid()}-"


@dataclass(frozen=True, order=True, slots=True)
class Leak:
    """One thing that should be gone; `name` is a POSIX name, "FD TARGET" or "PID START"."""

    kind: str
    name: str
    note: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.kind} {self.name}{self.note and f' ({self.note})'}"


def become_subreaper() -> None:
    """Make orphaned grandchildren ours, so that they are seen and can be ended."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def detached_mqueue() -> int | None:
    """A descriptor of this IPC namespace's mqueue file system, or None if we may not have one."""
    context = _libc.syscall(_SYS_FSOPEN, b"mqueue", _CLOEXEC)
    if context < 0:
        return None
    try:
        if _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) < 0:
            return None
        mount = _libc.syscall(_SYS_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    if mount < 0:
        return None
    try:
        # The mount's own descriptor only names the place (O_PATH).
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=mount)
    finally:
        os.close(mount)


def segments() -> set[Leak]:
    """Shared-memory segments of this worker's clusters."""
    prefix = NAME_PREFIX + WORKER_CLUSTERS
    names = os.listdir("/dev/shm")
    return {Leak("shared-memory segment", f"/{name}") for name in names if name.startswith(prefix)}


def queues(mqueue: int | None, run_directories: Path | None) -> set[Leak]:
    """Message queues of this worker's clusters; `mqueue` comes from `detached_mqueue`."""
    if mqueue is not None:
        names = os.listdir(mqueue)
    elif run_directories is not None:
        names = [name for name in _registered_queues(run_directories) if _queue_exists(name)]
    else:
        names = []
    prefix = NAME_PREFIX + WORKER_CLUSTERS
    return {Leak("message queue", f"/{name}") for name in names if name.startswith(prefix)}


def _registered_queues(run_directories: Path) -> list[str]:
    # Not Path.glob: Python 3.11.2's fails at a symbolic link whose target is too long for a name.
    return [
        entry.removeprefix("queue:")
        for folder, _, entries in os.walk(run_directories)
        if Path(folder).name == "registry"
        for entry in entries
        if entry.startswith("queue:")
    ]


def _queue_exists(name: str) -> bool:
    try:
        queue = posix_ipc.MessageQueue(f"/{name}")
    except (posix_ipc.ExistentialError, posix_ipc.PermissionsError):
        return False
    queue.close()
    return True


def descriptors() -> set[Leak]:
    """Open file descriptors, but for those that multiprocess keeps for its helper processes."""
    kept = _helpers("_forkserver_alive_fd", "_fd")
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = Path(f"/proc/self/fd/{number}").readlink()
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
        if int(number) not in kept:
            found.add(Leak("file descriptor", f"{number} {target}"))
    return found


def processes() -> set[Leak]:
    """Living descendants, but for multiprocess's helpers; dead ones are reaped on the way."""
    kept = _helpers("_forkserver_pid", "_pid")
    children: dict[int, list[tuple[int, str]]] = {}
    # This is done twice a test, so it is done the short way.
    for name in os.listdir("/proc"):
        if name.isdecimal() and (stat := _proc_text(name, "stat")):
            fields = stat.rpartition(")")[2].split()
            pid, parent = int(name), int(fields[1])
            if fields[0] not in "ZX":
                children.setdefault(parent, []).append((pid, fields[19]))
            elif parent == os.getpid():
                _reap(pid)
    found = set()
    unvisited = [os.getpid()]
    while unvisited:
        for pid, start in children.get(unvisited.pop(), []):
            unvisited.append(pid)
            if pid not in kept:
                command = _proc_text(str(pid), "cmdline").replace("\0", " ").strip()
                found.add(Leak("process", f"{pid} {start}", command))
    return found


def _proc_text(pid: str, name: str) -> str:
    """A file of a process, cut off where nobody would read on; empty when it is gone."""
    try:
        descriptor = os.open(f"/proc/{pid}/{name}", os.O_RDONLY)
        try:
            return os.read(descriptor, 4096).decode(errors="replace")
        finally:
            os.close(descriptor)
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_for_exits(known: set[Leak]) -> None:
    """Give processes beyond the known ones a bounded time to go."""
    deadline = time.monotonic() + _EXIT_GRACE_SECONDS
    while processes() - known and time.monotonic() < deadline:
        time.sleep(0.02)


def end(leaks: Iterable[Leak]) -> None:
    """Remove leaked segments, queues and processes so that the next test starts clean."""
    for leak in leaks:
        match leak.kind:
            case "shared-memory segment":
                unlink_segment(leak.name)
            case "message queue":
                unlink_queue(leak.name)
            case "process":
                pid = int(leak.name.split()[0])
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                _reap(pid, wait=True)


def _reap(pid: int, *, wait: bool = False) -> None:
    try:
        os.waitpid(pid, 0 if wait else os.WNOHANG)
    except ChildProcessError:
        return  # not our child: its parent, or we ourselves once that is gone, will


def _helpers(*attributes: str) -> set[int]:
    """Ids or descriptors of the fork server and resource tracker, which live as long as we do."""
    from multiprocess import forkserver, resource_tracker

    owners = (forkserver._forkserver, resource_tracker._resource_tracker)
    values = (getattr(owner, name, None) for owner in owners for name in attributes)
    return {value for value in values if value is not None}
