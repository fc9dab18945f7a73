"""What guests should have as RAM of a machine that lends, as the oracle knows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from hypervisor.machine import Machine
from hypervisor.pools import Settings
from ipc.abi import PAGE_BYTES, Reason, Reply, Status
from tests.support.expectations import GUESTS, Mismatch

_FRAMES_A_CALL: Final = 1024


class Ram:
    """`lent` are the frames of each guest, over restarts and deaths."""

    def __init__(self, *, lends: bool) -> None:
        self.lent: dict[str, int] = dict.fromkeys(GUESTS, 0)
        self.intent: tuple[str, int] | None = None
        """Guest, and the size that it wants, of a LEND that is killed."""
        self._lends = lends

    def started(self, machine: Machine, settings: Mapping[str, Settings]) -> None:
        """A hypervisor has started: every guest that is here has what it had."""
        self._machine, self._settings = machine, settings
        intent, self.intent = self.intent, None
        for name, had in self.lent.items():
            client = machine.clients.get(name)
            has = len(client.lent) if client is not None else 0
            wanted = intent[1] if intent is not None and intent[0] == name else had
            if client is not None and not min(had, wanted) <= has <= max(had, wanted):
                raise Mismatch(f"{name} had {had} frames as RAM, and has {has} after a restart")
            self.lent[name] = has

    @property
    def lendable(self) -> int:
        """Frames that are neither lent nor reserved."""
        reserved_bytes = sum(one.reserve_bytes for one in self._settings.values())
        frames = self._machine.store.frames.count
        return frames - sum(self.lent.values()) - -(-reserved_bytes // PAGE_BYTES)

    def most(self, name: str, wanted: int) -> int:
        """What a guest has after one LEND if there is room for it."""
        had = self.lent[name]
        if wanted <= had:
            return max(wanted, had - _FRAMES_A_CALL)
        return had + min(wanted - had, _FRAMES_A_CALL, max(0, self.lendable))

    def answered(self, name: str, wanted: int, most: int, reply: Reply) -> None:
        """A guest that may have had `most` was answered."""
        if not self._lends:
            if (reply.status, reply.reason) != (Status.ENOSYS, Reason.LENDING_OFF):
                raise Mismatch(f"a machine that does not lend: {reply}")
            return
        had, has = self.lent[name], reply.value
        if reply.status != Status.DONE or not min(had, most) <= has <= most:
            raise Mismatch(f"{name} had {had}, wants {wanted} and may have {most}: {reply}")
        self.lent[name] = has
        store = self._machine.store
        if has == most:
            return
        if most < had:
            raise Mismatch(f"{name} had {had}, wants {wanted} and has {has} left")
        if store.frames.free:
            raise Mismatch(f"{store.frames.free} frames are free and {name} was lent too few")
        protected = any(one.reserve_bytes for one in self._settings.values())
        ephemeral = any(member.pages for member in store.victims.members.values())
        if ephemeral and not protected and store.evictions_left > 0:
            raise Mismatch(f"ephemeral pages are there and {name} was lent too few")
