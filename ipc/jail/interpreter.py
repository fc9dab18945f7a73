"""What any process of ours asks of the kernel because it is Python, with the reason for each call.

The policies (`guests.jail`, `hypervisor.jail`) name what is theirs beside it.
"""

from __future__ import annotations

import fcntl
from typing import Final

from ipc.jail.seccomp import Argument, Call, one_of

WORD: Final = 0xFFFF_FFFF
"""All of an argument that a filter looks at."""
_TCGETS: Final = 0x5401
_FIONBIO: Final = 0x5421
_FIOCLEX: Final = 0x5451
_PROT_EXEC: Final = 4
# Not F_SETOWN, by which the kernel would send signals to others.
_FCNTL: Final = (
    fcntl.F_DUPFD_CLOEXEC,
    fcntl.F_GETFD,
    fcntl.F_SETFD,
    fcntl.F_GETFL,
    fcntl.F_SETFL,
)

INTERPRETER: Final = (
    Call("lseek", "a file object finds out where it stands"),
    Call("ioctl", "a file object asks whether it is a terminal", (Argument(1, WORD, _TCGETS),)),
    Call("ioctl", "a socket does not block", (Argument(1, WORD, _FIONBIO),)),
    Call("ioctl", "a descriptor is not inherited", (Argument(1, WORD, _FIOCLEX),)),
    *one_of("fcntl", "flags of a descriptor", 1, _FCNTL),
    Call("brk", "memory"),
    Call("mmap", "memory, windows; never to be executed", (Argument(2, _PROT_EXEC, 0),)),
    Call("mprotect", "memory of the C library; never executed", (Argument(2, _PROT_EXEC, 0),)),
    Call("munmap", "memory given back"),
    Call("mremap", "a large object grows"),
    Call("rt_sigaction", "SIGTERM is heard"),
    Call("rt_sigreturn", "the end of a signal handler"),
    Call("sigaltstack", "a report of a crash has a stack"),
    Call("restart_syscall", "a wait goes on after SIGSTOP and SIGCONT"),
    Call("poll", "sockets"),
    Call("ppoll", "the same on aarch64"),
    Call("select", "the same, for the C library"),
    Call("clock_getres", "how fine a clock is"),
    Call("clock_nanosleep", "waiting"),
    Call("nanosleep", "waiting"),
    Call("getrusage", "its own CPU time"),
    Call("getpid", "who it is"),
    Call("gettid", "who it is"),
    Call("getppid", "who it is"),
    Call("getuid", "who it is"),
    Call("geteuid", "who it is"),
    Call("getgid", "who it is"),
    Call("getegid", "who it is"),
    Call("shutdown", "a connection ends"),
    Call("setsockopt", "how long a connection waits"),
    Call("getsockname", "an accepted socket is looked at by its object"),
    Call("getpeername", "an accepted socket is looked at by its object"),
    Call("mq_getsetattr", "the size of a queue"),
    Call("exit", "the end"),
    Call("exit_group", "the end"),
)
