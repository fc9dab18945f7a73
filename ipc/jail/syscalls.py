"""System calls by number: those that the C library of an older machine has no function for, and the
numbers that a filter compares.

Numbers are of the kernel's binary interface and never change: x86-64 from its own table, aarch64
from the generic one, which leaves out whatever has a newer form (`open`, `poll`, `rename`).
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True)
class Architecture:
    """A machine as seccomp names it (`audit`, linux/audit.h); its column in `NUMBERS`."""

    name: str
    audit: int
    column: int


X86_64: Final = Architecture("x86_64", 0xC000003E, 0)
AARCH64: Final = Architecture("aarch64", 0xC00000B7, 1)
X32_BIT: Final = 0x4000_0000
"""Set in the numbers of x32 calls, which come under x86-64's name."""

NUMBERS: Final[dict[str, tuple[int | None, int | None]]] = {
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, None),
    "close": (3, 57),
    "fstat": (5, 80),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "ioctl": (16, 29),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "shmget": (29, 194),
    "dup": (32, 23),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "socket": (41, 198),
    "connect": (42, 203),
    "accept": (43, 202),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "shutdown": (48, 210),
    "bind": (49, 200),
    "listen": (50, 201),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "socketpair": (53, 199),
    "setsockopt": (54, 208),
    "getsockopt": (55, 209),
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "exit": (60, 93),
    "kill": (62, 129),
    "uname": (63, 160),
    "fcntl": (72, 25),
    "flock": (73, 32),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "rename": (82, None),
    "mkdir": (83, None),
    "unlink": (87, None),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchown": (93, 55),
    "getrusage": (98, 165),
    "ptrace": (101, 117),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "setuid": (105, 146),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "setresuid": (117, 147),
    "sigaltstack": (131, 132),
    "prctl": (157, 167),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "gettid": (186, 178),
    "futex": (202, 98),
    "getdents64": (217, 61),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "epoll_wait": (232, None),
    "epoll_ctl": (233, 21),
    "tgkill": (234, 131),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183),
    "mq_getsetattr": (245, 185),
    "keyctl": (250, 219),
    "openat": (257, 56),
    "mkdirat": (258, 34),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "fchmodat": (268, 53),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "sync_file_range": (277, 84),
    "utimensat": (280, 88),
    "epoll_pwait": (281, 22),
    "fallocate": (285, 47),
    "accept4": (288, 242),
    "epoll_create1": (291, 20),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "process_vm_readv": (310, 270),
    "renameat2": (316, 276),
    "seccomp": (317, 277),
    "getrandom": (318, 278),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "rseq": (334, 293),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "pidfd_open": (434, 434),
    "clone3": (435, 435),
    "pidfd_getfd": (438, 438),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}
"""Number on x86-64 and on aarch64; None: that machine has no such call."""


def architecture(machine: str | None = None) -> Architecture | None:
    """Of this process, or of the machine of that name; None for one whose numbers are not here."""
    known = {one.name: one for one in (X86_64, AARCH64)}
    # A 32-bit process on a 64-bit kernel has other numbers.
    return known.get(machine or platform.machine()) if ctypes.sizeof(ctypes.c_void_p) == 8 else None


def number(name: str, machine: Architecture) -> int | None:
    """Of a call; None where that machine has none."""
    return NUMBERS[name][machine.column]


def call(name: str, *arguments: int | ctypes._Pointer[ctypes.Structure] | bytes | None) -> int:
    """Make a system call; raises OSError (ENOSYS where this machine is not known)."""
    machine = architecture()
    found = None if machine is None else number(name, machine)
    # ctypes would pass a plain number as an int of 32 bits.
    wide = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = int(_libc.syscall(ctypes.c_long(-1 if found is None else found), *wide))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result
