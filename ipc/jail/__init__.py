"""How a process gives rights up for good: the mechanism, without a policy.

    syscalls    the plain calls, and their numbers on x86-64 and aarch64
    landlock    which files, and later which ports, signals and sockets, it may reach
    seccomp     which system calls it may make
    limits      user id, capabilities, no-new-privileges, dumpability, sizes
    cgroup      memory, as the host counts it

Each says what the kernel lacks for it and does the rest.  `guests.jail` and `hypervisor.jail` are
the policies.  ctypes and nothing else: no library to install, none to trust.

A part is *missing* when this machine can't give it; the text says which and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Mode = Literal["off", "auto", "strict"]
MODES: Final[tuple[Mode, ...]] = ("off", "auto", "strict")


@dataclass(frozen=True)
class JailSpec:
    """How a process is jailed: not at all, as far as this machine can, or wholly or not at all.

    `uid` is a user id of its own and `gid` the one group that all guests of its cluster have; None
    where the starter is not root, who alone can give ids away.
    """

    mode: Mode = "off"
    uid: int | None = None
    gid: int | None = None

    @property
    def shut(self) -> bool:
        """Whether there is a jail."""
        return self.mode != "off"
