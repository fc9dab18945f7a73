"""Who a process is and how much it may take: user id, capabilities, sizes; none of it to be undone.

Capabilities, no-new-privileges and what follows from them are a thread's own in Linux: all of this
is for a process of one thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Final

_PR_SET_DUMPABLE: Final = 4
_PR_GET_DUMPABLE: Final = 3
_PR_SET_KEEPCAPS: Final = 8
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITIES_MAX: Final = 64
_CAPABILITY_VERSION: Final = 0x2008_0522

_libc = ctypes.CDLL(None, use_errno=True)


class Capability(IntEnum):
    """Those that a part of ours may keep; linux/capability.h."""

    CHOWN = 0
    DAC_OVERRIDE = 1


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def no_new_privileges() -> None:
    """Nothing that is executed from here on has more rights than this process."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def forbid_dump() -> None:
    """No core file, and nobody but root may trace this process or read its memory.

    Changing user ids sets it back, so it comes last.  /proc/PID then belongs to root: `stat`,
    `status` and what else everybody may read can still be read.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def is_dumpable() -> bool:
    """Whether others of this user may trace this process."""
    return bool(_libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0))


def capabilities_of(pid: int | str = "self") -> int:
    """The effective capabilities, a bit each."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def can_give_ids(uid: int) -> str | None:
    """Why this process can't become the user `uid`; None if it can."""
    if os.geteuid() != 0:
        return "a user id of its own (only root can give one)"
    wanted = 1 << 6 | 1 << 7 | 1 << Capability.CHOWN | 1 << Capability.DAC_OVERRIDE
    if capabilities_of() & wanted != wanted:
        return "a user id of its own (root has no CAP_SETUID, CAP_SETGID or CAP_CHOWN here)"
    if not (_is_mapped("uid", uid) and _is_mapped("gid", uid)):
        return f"a user id of its own ({uid} is not mapped in this user namespace)"
    return None


def _is_mapped(kind: str, number: int) -> bool:
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/self/{kind}_map").read_text().splitlines():
            first, _outside, length = map(int, line.split())
            if first <= number < first + length:
                return True
        return False
    # A kernel without user namespaces has no map.
    return True


def become(
    uid: int,
    gid: int,
    keep: frozenset[Capability] = frozenset(),
    real: int = -1,
    others: Sequence[int] = (),
) -> None:
    """Another user, with one group, others beside it and these capabilities; no way back.

    `real` is the real user id, if it is to differ: by it a process is known to those who may send
    signals to it.
    """
    _empty_bounding_set()
    os.setgroups(others)
    os.setresgid(gid, gid, gid)
    _prctl(_PR_SET_KEEPCAPS, 1)
    os.setresuid(uid if real < 0 else real, uid, uid)
    keep_capabilities(keep)


def keep_capabilities(keep: frozenset[Capability] = frozenset()) -> None:
    """Lose all others, for whatever is executed too."""
    _empty_bounding_set()
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    mask = sum(1 << capability for capability in keep)
    header = _Header(_CAPABILITY_VERSION, 0)
    sets = (_Sets * 2)(_Sets(mask, mask, 0), _Sets(0, 0, 0))
    if _libc.capset(ctypes.byref(header), sets) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"capset: {os.strerror(code)}")


def _empty_bounding_set() -> None:
    """Which takes CAP_SETPCAP, so it goes first; who has not got that has no other either."""
    for capability in range(_CAPABILITIES_MAX):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break


def limit(sizes: Mapping[int, int]) -> None:
    """Bounds of setrlimit(2), soft and hard; one that is lower already stays."""
    for kind, most in sizes.items():
        hard = resource.getrlimit(kind)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (bound, bound))


def limit_for_now(kind: int, most: int) -> None:
    """A soft bound, which `limit` may change once more."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def mapped_bytes() -> int:
    """Address space of this process now (VmSize)."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")
