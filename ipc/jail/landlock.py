"""Which files a process may reach: Landlock, which needs no privilege and can't be taken off.

A rule allows rights on a file, or on a folder and all below it; what no rule allows is refused with
EACCES when it is opened.  Files that are open stay usable, and stat(2) and chdir(2) are not covered
by it.  A process in here can neither trace one outside nor read its memory, at any level.

Levels of the kernel's interface, each used where it is there:

    1  Linux 5.13   opening, making and removing files
    2  5.19         renaming into another folder, for which there was only a refusal before
    3  6.2          truncating
    4  6.7          TCP: neither bind nor connect, to any port
    5  6.10         ioctl on device files
    6  6.12         signals and abstract sockets only to processes in the same jail
    9  7.1          connecting to sockets in the file system

Not used: 7 (what is written to the kernel's log), 8 (a jail for all threads; we have one yet).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Iterable
from enum import IntFlag
from pathlib import Path
from typing import Final, NamedTuple

from ipc.jail.syscalls import call


class Access(IntFlag):
    """Rights on files; LANDLOCK_ACCESS_FS_* of linux/landlock.h."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15
    RESOLVE_UNIX = 1 << 16


QUEUES: Final = Path("/dev/mqueue")
"""Where message queues are seen."""
_CLOEXEC: Final = 1
"""FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC."""
_FSCONFIG_CREATE: Final = 6
_OF_FILES: Final = (
    Access.EXECUTE
    | Access.WRITE_FILE
    | Access.READ_FILE
    | Access.TRUNCATE
    | Access.IOCTL_DEV
    | Access.RESOLVE_UNIX
)
"""Rights that a rule for a single file may name."""
_SINCE: Final = (
    (1, Access(Access.REFER - 1)),
    (2, Access.REFER),
    (3, Access.TRUNCATE),
    (5, Access.IOCTL_DEV),
    (9, Access.RESOLVE_UNIX),
)
_TCP: Final = 3
_ABSTRACT_SOCKETS: Final = 1
_SIGNALS: Final = 2
_VERSION_FLAG: Final = 1
_RULE_PATH_BENEATH: Final = 1
_WORDS: Final = (
    (3, "truncation (Linux 6.2)"),
    (4, "TCP (Linux 6.7)"),
    (5, "device calls (Linux 6.10)"),
    (6, "signals and abstract sockets (Linux 6.12)"),
    (9, "named sockets (Linux 7.1)"),
)


class Rule(NamedTuple):
    """What is allowed on a file, or on a folder and everything below; a descriptor of one does."""

    path: Path | int
    access: Access


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def level() -> int:
    """Of the kernel's interface; 0 where there is none, or it is switched off."""
    try:
        return call("landlock_create_ruleset", None, 0, _VERSION_FLAG)
    except OSError:
        return 0


def handled(at: int) -> Access:
    """The rights on files that a kernel of this level can refuse."""
    rights = Access(0)
    for since, access in _SINCE:
        if at >= since:
            rights |= access
    return rights


def missing(at: int | None = None) -> str | None:
    """Why there are no rules for files here; None if there are."""
    if (level() if at is None else at) == 0:
        return "Landlock (Linux 5.13 or newer, and landlock among the kernel's lsm=)"
    queues = open_queues()
    if queues is None:
        return f"Landlock (queues could not be opened in it: mount -t mqueue none {QUEUES})"
    os.close(queues)
    return None


def open_queues() -> int | None:
    """The folder of all message queues, as a place for a rule; None if it can't be had.

    mq_open(3) goes by no path, but the queue has one, on a mount of the kernel's own, and Landlock
    looks at that.  A rule is for a folder wherever it is mounted, so any other mount of it does:
    one that is there, or, for root, one that appears nowhere.
    """
    with contextlib.suppress(OSError):
        system = call("fsopen", b"mqueue", _CLOEXEC)
        try:
            call("fsconfig", system, _FSCONFIG_CREATE, None, None, 0)
            return call("fsmount", system, _CLOEXEC, 0)
        finally:
            os.close(system)
    return os.open(QUEUES, os.O_PATH | os.O_CLOEXEC) if os.path.ismount(QUEUES) else None


def second_locks_missing(at: int | None = None) -> list[str]:
    """What newer kernels refuse in here, and this one leaves to other parts of the jail."""
    here = level() if at is None else at
    return [] if here == 0 else [f"Landlock on {words}" for since, words in _WORDS if here < since]


def enter(rules: Iterable[Rule], *, signals_out: bool = False) -> str | None:
    """From now on only these.  What is missing; no-new-privileges must be set (`limits`).

    A path that is not there needs no rule.  With `signals_out` signals to the outside are left to
    what user ids allow.
    """
    here = level()
    if here == 0:
        return missing(here)
    rights = handled(here)
    scoped = 0 if here < 6 else _ABSTRACT_SOCKETS | (0 if signals_out else _SIGNALS)
    shape = _Ruleset(rights, _TCP if here >= 4 else 0, scoped)
    ruleset = call("landlock_create_ruleset", ctypes.pointer(shape), _bytes_of_ruleset(here), 0)
    try:
        for rule in rules:
            _allow(ruleset, rule, rights)
        call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)
    return None


def hold_signals() -> None:
    """From now on signals go only to this process and those that it has forked since, or they; as
    far as the kernel has that.  No-new-privileges must be set."""
    here = level()
    if here < 6:
        return
    shape = _Ruleset(0, 0, _SIGNALS)
    ruleset = call("landlock_create_ruleset", ctypes.pointer(shape), _bytes_of_ruleset(here), 0)
    try:
        call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _bytes_of_ruleset(at: int) -> int:
    """An older kernel takes a longer structure only if what it does not know is zero; so it is."""
    return 8 if at < 4 else 16 if at < 6 else ctypes.sizeof(_Ruleset)


def _allow(ruleset: int, rule: Rule, rights: Access) -> None:
    try:
        fd = os.dup(rule.path) if isinstance(rule.path, int) else _open(rule.path)
    except FileNotFoundError:
        return
    try:
        access = rule.access & rights
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= _OF_FILES
        if access:
            beneath = _PathBeneath(access, fd)
            call("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, ctypes.pointer(beneath), 0)
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    return os.open(path, os.O_PATH | os.O_CLOEXEC)
