"""The jail of the hypervisor: after start-up it can open nothing outside of its run directory.

It parses what hostile guests send, so it has as little as they leave it.  In two steps, since its
second thread (`hypervisor.doorman`) must be inside, too, and what Landlock and capabilities say
holds for threads that start later:

    shut        when the arena is open, before the doors are: no new privileges, capabilities,
                Landlock, sizes, not dumpable
    filter      when the doors are open and the second thread runs: system calls, of all threads

What it keeps, and why:

* Its run directory: settings, registry, roster, logs, sockets.  The guests' disks are below it too,
  if they are copies; Landlock has no way to take a folder out of another.
* /proc, to read: when a process started tells two users of one id apart (`ipc.names`).  Memory,
  descriptors and environment of processes outside of the jail are closed to it, root or not.
* Removing names in /dev/shm: its arena's, at the end.  It can open nothing there; its arena is open
  and windows have no names.
* Queues, to make and to open by a name that it knows; it can't list them.
* As root it stays the user that it is, for the run directory's sake.  Of root's capabilities it
  keeps the one to give files away (a guest's queues belong to the guest's user), and where the run
  directory is somebody else's the one to write there.
"""

from __future__ import annotations

import fcntl
import logging
import os
import resource
from pathlib import Path
from typing import Final

import ipc.jail.lazily  # noqa: F401
from ipc.jail import JailSpec, check_strict, descriptors, landlock, limits, missing_parts, seccomp
from ipc.jail.interpreter import INTERPRETER, WORD
from ipc.jail.landlock import Access, Rule
from ipc.jail.limits import Capability
from ipc.jail.seccomp import Argument, Call, one_of
from ipc.segment import SHARED_MEMORY_DIRECTORY

log = logging.getLogger(__name__)

FILES_MAX: Final = 4096
"""Descriptors: 6 a guest, and those that knock."""
_FCNTL: Final = (
    fcntl.F_ADD_SEALS,
    fcntl.F_GET_SEALS,
)

_RUN_DIRECTORY: Final = (
    Access.READ_FILE
    | Access.WRITE_FILE
    | Access.TRUNCATE
    | Access.READ_DIR
    | Access.MAKE_REG
    | Access.MAKE_SOCK
    | Access.MAKE_DIR
    | Access.REMOVE_FILE
)


def calls(pid: int) -> tuple[Call, ...]:
    """All that the process `pid` may ask of the host's kernel."""
    return (
        *INTERPRETER,
        Call("read", "settings, the roster, /proc/PID/stat"),
        Call("write", "its logs and the audit log; settings; the doorman's eventfd"),
        Call("pread64", "its log is cut"),
        Call("fstat", "the size of what is open"),
        Call("newfstatat", "the same of newer C libraries; whether a file is there"),
        Call("close", "guests that have left"),
        Call("openat", "files of the run directory and /proc/PID/stat; Landlock says which"),
        Call("open", "the same, of the C library"),
        Call("getdents64", "the registry is searched"),
        Call("unlink", "sockets, entries of the registry, the arena's name"),
        Call("unlinkat", "the same on aarch64"),
        Call("rename", "settings are written anew; the audit log is turned over"),
        Call("renameat", "the same on aarch64"),
        Call("renameat2", "the same of newer C libraries"),
        Call("mkdir", "the registry is made if it is not there"),
        Call("mkdirat", "the same on aarch64"),
        Call("utimensat", "an entry of the registry is made once more"),
        Call("fchown", "a queue is its guest's"),
        Call("ftruncate", "a window has its size; its log is cut"),
        Call("fallocate", "memory of the arena goes back to the host"),
        Call("memfd_create", "a window"),
        *one_of("fcntl", "a window is sealed", 1, _FCNTL),
        Call("madvise", "memory of the arena goes back to the host"),
        Call("futex", "locks between the server and its doorman"),
        Call("set_robust_list", "the C library, in a thread that starts"),
        Call("rseq", "the C library, in a thread that starts"),
        Call("sched_yield", "a moment for a guest with a ring"),
        Call("rt_sigprocmask", "the doorman takes no signals"),
        Call("tgkill", "the doorman wakes the server", (Argument(0, WORD, pid),)),
        Call("epoll_ctl", "guests come and go"),
        Call("epoll_wait", "whoever calls"),
        Call("epoll_pwait", "the same on aarch64"),
        Call("clock_gettime", "CPU time that a guest has caused"),
        Call("uname", "which machine this is"),
        Call("getrandom", "names of queues"),
        Call("accept4", "its doors"),
        Call("accept", "its doors"),
        Call("sendto", "answers"),
        Call("recvfrom", "questions"),
        Call("sendmsg", "a window is handed over"),
        Call("recvmsg", "questions"),
        Call("getsockopt", "who has knocked"),
        Call("pidfd_open", "a guest's end is seen (SO_PEERPIDFD is of Linux 6.5)"),
        Call("mq_open", "queues of a guest"),
        Call("mq_unlink", "their names are removed"),
        Call("mq_timedsend", "replies"),
        Call("mq_timedreceive", "calls"),
    )


class HypervisorJail:
    """The way into the jail."""

    def __init__(self, jail: JailSpec, run_directory: Path) -> None:
        """OperatorError if the jail can't be as it must."""
        self._jail = jail
        self._run_directory = run_directory
        self._without = ""
        self._missing = missing_parts() if jail.shut else []
        if jail.mode == "strict":
            check_strict(self._missing)

    def shut(self) -> None:
        """Once the arena is open."""
        if not self._jail.shut:
            return
        self._without = "; ".join(landlock.second_locks_missing()) or "nothing"
        descriptors.let_go_of_input()
        queues = landlock.open_queues()
        limits.keep_capabilities(self._capabilities())
        limits.no_new_privileges()
        limits.limit({resource.RLIMIT_NOFILE: FILES_MAX, resource.RLIMIT_CORE: 0})
        if queues is not None:
            landlock.enter(
                [
                    Rule(self._run_directory, _RUN_DIRECTORY),
                    Rule(Path("/proc"), Access.READ_FILE),
                    Rule(SHARED_MEMORY_DIRECTORY, Access.REMOVE_FILE),
                    Rule(queues, Access.READ_FILE | Access.WRITE_FILE),
                ]
            )
            os.close(queues)
        limits.forbid_dump()

    def _capabilities(self) -> frozenset[Capability]:
        if os.geteuid() != 0:
            return frozenset()
        if self._run_directory.stat().st_uid == 0:
            return frozenset({Capability.CHOWN})
        return frozenset({Capability.CHOWN, Capability.DAC_OVERRIDE})

    def filter(self) -> None:
        """Once the doors are open."""
        if not self._jail.shut:
            return
        seccomp.enter(calls(os.getpid()), all_threads=True)
        log.info(
            "event=jail mode=%s uid=%d missing=%s without=%s",
            self._jail.mode,
            os.geteuid(),
            "; ".join(self._missing) or "nothing",
            self._without,
        )
