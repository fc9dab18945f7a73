"""The jails of one cluster: who gets which user id, and what this machine can give.

As root every guest has a user id of its own and all share one group, by which the run directory
lets them through to the hypervisor's door and to nothing else in it (mode 0710: no listing).  Nodes
of one volume have a real user id in common, which is a group of theirs, too (`guests.jail`).  The
ids are a block of 256 that is drawn for each cluster, from 0x70000000 up: above what distributions
and systemd's containers use, in no password file, so files that such a user left behind are
nobody's.

    first          the group
    first + n      guest n, from 1
    first + 128 + n  volume n
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

from ipc.jail import JailSpec, Mode, check_strict, landlock, limits, missing_parts
from ipc.jail.cgroup import MemoryGroups, remove
from ipc.names import Registry

log = logging.getLogger(__name__)

IDS_FIRST: Final = 0x7000_0000
_BLOCKS: Final = 1 << 20
_BLOCK: Final = 256
_VOLUMES_AT: Final = 128


class Jails:
    """`mode` for all; `guests` are names, with the volume that each of them mounts or None."""

    def __init__(self, mode: Mode, guests: Mapping[str, str | None]) -> None:
        """Raises OperatorError if they must be whole and can't be."""
        self.mode: Mode = mode
        self._numbers = {name: number for number, name in enumerate(guests, 1)}
        volumes = sorted({volume for volume in guests.values() if volume is not None})
        self._volumes = {
            name: volumes.index(volume) for name, volume in guests.items() if volume is not None
        }
        self._groups: list[Path] = []
        self.missing: list[str] = []
        """Parts that promises rest on and this machine can't give."""
        self._first: int | None = None
        if mode == "off":
            return
        self.missing = missing_here()
        if mode == "strict":
            check_strict(self.missing)
        self._memory_groups = MemoryGroups()
        # Drawn, so that guests of two clusters are two users, too.
        first = IDS_FIRST + _BLOCK * secrets.randbelow(_BLOCKS)
        if limits.can_give_ids(first) is None:
            self._first = first

    def prepare(self, run_directory: Path) -> None:
        """Let the guests through to the door."""
        if self._first is not None:
            os.chown(run_directory, -1, self._first)
            run_directory.chmod(0o710)

    def uid(self, name: str) -> int:
        """The user that a guest will be."""
        return os.getuid() if self._first is None else self._first + self._numbers[name]

    def of_hypervisor(self) -> JailSpec:
        """Its jail."""
        return JailSpec(self.mode, gid=self._first)

    def of_guest(self, name: str, group: Path | None) -> JailSpec:
        """A guest's jail, with the control group that was made for it."""
        if self._first is None:
            return JailSpec(self.mode, group=group)
        volume = self._volumes.get(name)
        real_uid = None if volume is None else self._first + _VOLUMES_AT + volume
        return JailSpec(self.mode, self.uid(name), self._first, real_uid, group)

    def make_group(
        self, cluster: str, name: str, memory_bytes: int, registry: Registry
    ) -> Path | None:
        """A control group for a guest, written down; None where there are none."""
        if self.mode == "off":
            return None
        try:
            group = self._memory_groups.make(f"{cluster}-{name}", memory_bytes)
        except OSError as reason:
            log.warning("event=no-memory-group guest=%s why=%s", name, reason)
            return None
        if group is not None:
            self._groups.append(group)
            registry.add("group", quote(str(group), safe=""))
        return group

    def remove_groups(self, registry: Registry) -> None:
        """Once the guests have ended."""
        for group in self._groups:
            if remove(group):
                registry.remove("group", quote(str(group), safe=""))
        self._groups.clear()


def missing_here() -> list[str]:
    """Parts that promises rest on and this machine can't give; ids are only root's to give."""
    refusal = limits.can_give_ids(IDS_FIRST) if os.geteuid() == 0 else None
    return [*missing_parts(), *([] if refusal is None else [refusal])]


def without() -> list[str]:
    """Second locks, on which no promise rests, that this machine has not."""
    groups = MemoryGroups().missing
    return [*landlock.second_locks_missing(), *([] if groups is None else [groups])]
