"""The jail of a guest: what is left to it before the first instruction of guest code.

Guest code (a workload, a command of `tmem exec`, an adversary) begins when the control socket is
first answered, and that is after `shut`.  To run hostile code in here name a module in the boot
spec (`guests.adversary` is the interface, with an example):

    GuestSpec(..., jail=JailSpec("auto"), adversary="guests.adversaries.flood")
    ask(guest socket, {"verb": "run", "workload": "adversary", "seed": 1, "parameters": {...}})
    ask(guest socket, {"verb": "status"})["report"]

In two steps, since a guest first has to open its disk, its swap and its sockets:

    step_down   working folder: the run directory.  As root: another user id, one for each guest,
                and of all capabilities only the one to open files for the time being.  No more
                memory than its RAM and the overhead.
    shut        no capability, no new privileges, Landlock, sizes, not dumpable, the filter.

What a guest still needs afterwards, and how it comes by it:

* Its disk, swap, log and listening socket are open.  No other file can be opened (but see nodes).
* The door of a hypervisor that was started again: `connect`, by a path relative to the working
  folder, because another user may not pass through the folders above it.  Sockets are of the door's
  type only, SEQPACKET: the administrator's sockets are streams, and refuse it (EPROTOTYPE).
* Its new queues: `mq_open`, never with O_CREAT.  Their names are told and can't be guessed.
* Files of the host that a workload reads or writes come open with the question (`guests.control`),
  and what it reads of itself in /proc is kept open (`guests.keptfiles`).
* No descriptor of its starter's (`ipc.jail.descriptors`): what it says on standard output and error
  stands in its own log.
* Modules: all are imported before, and so are the text encodings that Python sources may name.

A *node* (a guest that mounts a volume with others) needs more: to kill one that was stopped in the
middle of a write (`fs.block.reservations`), which is what fencing means; it talks to the others
through sockets of the door's type.  So it may read /proc, to be sure of whom it kills, and send
SIGKILL, to whom user ids allow: nodes of one volume have one *real* user id beside their own, by
which that is decided; nobody else's process is among them.  That number is their group, too, by
which they alone may connect to each other.  Where nobody has an id of his own, all that is any
guest of the cluster (`ipc.jail.enclosure`), or any process of the user before Linux 6.12.
"""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Final

import ipc.jail.warmup  # noqa: F401
from guests import keptfiles
from guests.kernel import GuestSpec
from ipc.jail import cgroup, check_strict, landlock, limits, missing_parts, seccomp
from ipc.jail.interpreter import INTERPRETER, WORD
from ipc.jail.landlock import Access, Rule
from ipc.jail.seccomp import Argument, Call, one_of

log = logging.getLogger(__name__)

OVERHEAD_BYTES: Final = 256 * 2**20
"""Address space beyond what is mapped when the jail is shut (the RAM is)."""
OVERHEAD_SHARE: Final = 4
"""And for the tables: a byte for each 4 of RAM, which is several times what they take, ..."""
SWAP_OVERHEAD_SHARE: Final = 64
"""... and one for each 64 of swap."""
FILES_MAX: Final = 256
"""Descriptors: queues, window, disk, swap, log, 16 of the control socket, 2 for each other node."""
FILE_BYTES_MIN: Final = 64 * 2**20
"""No file is made longer than this, or than the disk and the swap are."""

_CLOEXEC_AND_NONBLOCK: Final = socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
_SOCKET_TYPE: Final = WORD & ~_CLOEXEC_AND_NONBLOCK
_FCNTL: Final = (
    fcntl.F_OFD_GETLK,
    fcntl.F_OFD_SETLK,
    fcntl.F_OFD_SETLKW,
)
_ANY_WRITING: Final = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC

CALLS: Final = (
    *INTERPRETER,
    Call("read", "its sockets"),
    Call("write", "its log, its wakeup socket"),
    Call("readv", "one disk request into several frames"),
    Call("writev", "the same the other way"),
    Call("pread64", "its disk and its swap"),
    Call("pwrite64", "its disk and its swap"),
    Call("preadv", "its disk and its swap, several frames at once"),
    Call("pwritev", "its disk and its swap, several frames at once"),
    Call("preadv2", "the same, as the interpreter has it"),
    Call("pwritev2", "the same, as the interpreter has it"),
    Call("fstat", "the size of what is open"),
    Call("newfstatat", "fstat of newer C libraries; the time zone's file, once a log line"),
    Call("close", "what it has open"),
    Call("fsync", "what it has written is on the disk"),
    Call("fdatasync", "the same without the times"),
    Call("sync_file_range", "a part of the disk's image is on its way"),
    Call("ftruncate", "its log is cut"),
    *one_of("fcntl", "locks on the bytes of a shared image", 1, _FCNTL),
    Call("flock", "the lock of a node's socket is given back"),
    Call("dup", "a file object of its own for a descriptor"),
    Call("madvise", "RAM goes back to the host (balloon), or may be merged (KSM)"),
    Call("futex", "locks of the interpreter; the fence of the ring"),
    Call("sched_yield", "the ring waits a moment for its answer"),
    Call("rt_sigprocmask", "the C library, around what must not be interrupted"),
    Call("epoll_create1", "the sockets of a node's mesh"),
    Call("epoll_ctl", "the sockets of a node's mesh"),
    Call("epoll_wait", "the sockets of a node's mesh"),
    Call("epoll_pwait", "the same on aarch64"),
    Call("clock_gettime", "time, where it is no matter of memory"),
    Call("uname", "which machine this is: whether the ring may be used"),
    Call("getrandom", "seeds of the interpreter, keys of a mesh"),
    Call(
        "socket",
        "the door of a hypervisor that was started again, other nodes",
        (
            Argument(0, WORD, socket.AF_UNIX),
            Argument(1, _SOCKET_TYPE, socket.SOCK_SEQPACKET),
        ),
    ),
    Call("connect", "the same"),
    Call("accept4", "its control socket"),
    Call("accept", "its control socket"),
    Call("sendto", "answers"),
    Call("recvfrom", "questions"),
    Call("sendmsg", "answers, messages to other nodes"),
    Call("recvmsg", "questions with the files that they need, and the window"),
    Call("getsockopt", "why a connection failed"),
    Call(
        "mq_open",
        "the queues of a new attachment, none of its own making",
        (Argument(1, os.O_CREAT, 0),),
    ),
    Call("mq_timedsend", "calls to the hypervisor"),
    Call("mq_timedreceive", "its answers"),
)
"""All that a guest may ask of the host's kernel."""

NODE_CALLS: Final = (
    Call("pidfd_open", "a node that was stopped in the middle of a write is found"),
    Call("pidfd_send_signal", "and killed", (Argument(1, WORD, signal.SIGKILL),)),
    Call(
        "openat",
        "/proc/PID/stat: it is that process and no later one",
        (Argument(2, _ANY_WRITING, os.O_RDONLY),),
    ),
)
"""And a node beyond that."""


class GuestJail:
    """The way into the jail of one guest; `spec` is its boot spec, with paths that fit inside."""

    def __init__(self, spec: GuestSpec) -> None:
        self.spec = spec
        self.missing: list[str] = []
        """Parts that a promise rests on and this machine can't give."""
        self._jail = spec.jail
        self._queues: int | None = None

    def step_down(self) -> None:
        """Before files are opened.  OperatorError if the jail can't be as it must."""
        jail, spec = self._jail, self.spec
        if not jail.shut:
            return
        self.missing = missing_parts()
        if jail.uid is None and os.geteuid() == 0:
            self.missing.append("user id of its own")
        if jail.mode == "strict":
            check_strict(self.missing)
        self._queues = landlock.open_queues()
        if jail.group is not None:
            try:
                cgroup.enter(jail.group)
            except OSError as reason:
                log.warning("event=no-memory-group why=%s", reason)
        os.chdir(spec.run_directory)
        self.spec = replace(
            spec,
            image=spec.image.absolute(),
            swap=None if spec.swap is None else spec.swap.absolute(),
            run_directory=Path(),
        )
        if jail.uid is not None and jail.gid is not None:
            keep = frozenset({limits.Capability.DAC_OVERRIDE})
            if jail.real_uid is None:
                limits.become(jail.uid, jail.gid, keep)
            else:
                # The volume's number is its group's, too: sockets of nodes are for nodes of it.
                others = (jail.gid,)
                limits.become(jail.uid, jail.real_uid, keep, jail.real_uid, others)
        # The disk is mounted before the jail is shut, and a hostile guest has written it.
        memory_bytes = limits.mapped_bytes() + spec.memory_bytes + overhead_bytes(spec)
        limits.limit_for_now(resource.RLIMIT_AS, memory_bytes)

    def shut(self) -> None:
        """Once everything is open; no way back."""
        jail = self._jail
        if not jail.shut:
            return
        is_node = self.spec.node is not None
        without = "; ".join(landlock.second_locks_missing()) or "nothing"
        keptfiles.hold()
        sizes = self._sizes()  # while files in folders of others can be looked at
        limits.keep_capabilities()
        limits.no_new_privileges()
        limits.limit(sizes)
        if self._queues is not None:
            rules = [
                Rule(Path(), Access.RESOLVE_UNIX),
                Rule(self._queues, Access.READ_FILE | Access.WRITE_FILE),
            ]
            if is_node:
                rules.append(Rule(Path("/proc"), Access.READ_FILE))
            landlock.enter(rules, signals_out=is_node)
            os.close(self._queues)
        limits.forbid_dump()
        seccomp.enter((*CALLS, *NODE_CALLS) if is_node else CALLS)
        log.info(
            "event=jail mode=%s uid=%d missing=%s without=%s",
            jail.mode,
            os.geteuid(),
            "; ".join(self.missing) or "nothing",
            without,
        )

    def _sizes(self) -> dict[int, int]:
        spec = self.spec
        files = [_size_of(path) for path in (spec.image, spec.swap)]
        return {
            resource.RLIMIT_AS: limits.mapped_bytes() + overhead_bytes(spec),
            resource.RLIMIT_FSIZE: max(FILE_BYTES_MIN, *files),
            resource.RLIMIT_NOFILE: FILES_MAX,
            # Of this user id, this process included; of its own making none.
            resource.RLIMIT_NPROC: 1,
            resource.RLIMIT_MSGQUEUE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_CORE: 0,
        }


def overhead_bytes(spec: GuestSpec) -> int:
    """What a guest may take beyond its RAM."""
    swap_bytes = _size_of(spec.swap)
    tables = spec.memory_bytes // OVERHEAD_SHARE + swap_bytes // SWAP_OVERHEAD_SHARE
    return OVERHEAD_BYTES + tables


def _size_of(path: Path | None) -> int:
    """Whoever opens it says what is wrong with it."""
    try:
        return 0 if path is None else path.stat().st_size
    except OSError:
        return 0
