"""How a process gives rights up for good: the mechanism, without a policy.

    syscalls    the plain calls, and their numbers on x86-64 and aarch64
    landlock    which files, and later which ports, signals and sockets, it may reach
    seccomp     which system calls it may make
    interpreter the calls that any process of ours makes
    limits      user id, capabilities, no-new-privileges, dumpability, sizes
    descriptors what it has open because its starter had
    enclosure   of a fork server and its children: no signal gets out
    cgroup      memory, as the host counts it
    lazily      what must be imported before
    warmup      that, and what text encodings need

Each says what the kernel lacks for it and does the rest.  `guests.jail` and `hypervisor.jail` are
the policies.  ctypes and nothing else: no library to install, none to trust.

A part is *missing* when this machine can't give it; the text says which and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from ipc.errors import ExitCode, OperatorError
from ipc.jail import landlock, seccomp

Mode = Literal["off", "auto", "strict"]
MODES: Final[tuple[Mode, ...]] = ("off", "auto", "strict")


@dataclass(frozen=True)
class JailSpec:
    """How a process is jailed: not at all, as far as this machine can, or wholly or not at all.

    `uid` is a user id of its own and `gid` the one group that all guests of its cluster have; None
    where the starter is not root, who alone can give ids away.  `real_uid` is what it shares with
    those who may send signals to it and connect to its sockets (it is their group as well).
    `group` is the control group to enter, if one was made.
    """

    mode: Mode = "off"
    uid: int | None = None
    gid: int | None = None
    real_uid: int | None = None
    group: Path | None = None

    @property
    def shut(self) -> bool:
        """Whether there is a jail."""
        return self.mode != "off"


def missing_parts() -> list[str]:
    """Parts that promises rest on (hypervisor/SECURITY.md) and this machine can't give."""
    return [part for part in (landlock.missing(), seccomp.missing()) if part is not None]


def check_strict(missing: Sequence[str]) -> None:
    """Raise OperatorError if a jail that must be whole would not be."""
    if missing:
        raise OperatorError(
            f"jail strict: this machine has no {'; no '.join(missing)}; use jail auto to go on "
            "without",
            ExitCode.UNAVAILABLE,
        )
