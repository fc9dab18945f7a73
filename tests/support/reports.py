"""Of wrong pages that guests report: who put them is told, and nothing changes."""

from __future__ import annotations

from typing import Final

from hypervisor.machine import Machine
from hypervisor.pools import Client
from hypervisor.provenance import pages_of, report_words
from hypervisor.residents import Report
from ipc.abi import Reply, Status, oid_from_int
from tests.support.expectations import UUIDS, Handle, Known, Mismatch

_PAGES_CHECKED: Final = 4


class Reports:
    """One report after the other: `begin`, and then what came of it."""

    def __init__(self) -> None:
        self._heard: dict[str, object] | None = None
        """What the audit log says of it."""

    def begin(self, machine: Machine) -> None:
        """A report is about to be made."""
        self._machine = machine
        self._heard = None
        self._before = self._effects()
        machine.hear = self._hear

    def _effects(self) -> tuple[int, ...]:
        store = self._machine.store
        costs = (client.cost_bytes for client in self._machine.clients.values())
        return store.sequence, store.evictions, store.frames.free, sum(costs)

    def _hear(self, _client: Client, report: Report) -> None:
        self._heard = report_words(self._machine, report)

    def denied(self) -> None:
        """It was refused for want of a right."""
        if self._heard is not None or self._effects() != self._before:
            raise Mismatch(f"a report of one who may not was heard: {self._heard}")

    def answered(
        self, known: Known, handle: Handle, page: bytes, reply: Reply, evictions: int
    ) -> None:
        """It was heard; `known` is the pool, `page` what its guest says it has got."""
        if self._effects() != self._before:
            raise Mismatch("a report had an effect")
        there = reply.status == Status.DONE
        expected = known.get(*handle) == page
        sure = there or known.persistent or known.seen.get(handle) == evictions
        if there != expected and sure:
            raise Mismatch(f"a report of {handle}, {expected=}: {reply}")
        heard = self._heard
        if heard is None or (heard["page"] == "there") != there or ("put_by" in heard) != there:
            raise Mismatch(f"a report of {handle}: {reply}, heard was {heard}")
        putter, token = known.putters.get(handle, ("", 0))
        if there and putter and heard["put_by"] != putter:
            raise Mismatch(f"{handle} was put by {putter}, not {heard}")
        if there and putter and heard.get("token") != (f"{token:#x}" if known.fenced else None):
            raise Mismatch(f"{handle} was put under {token:#x}, not {heard}")


def check_provenance(machine: Machine, known: Known, oid: int) -> None:
    """Of some pages of an object that are there, in a shared ephemeral pool."""
    pool = machine.memberships.shared[UUIDS[known.kind]]
    for index in list(known.objects.get(oid, ()))[-_PAGES_CHECKED:]:
        expected = known.putters.get((oid, index))
        for page in pages_of(machine, [pool], oid_from_int(oid), index):
            if expected is not None and (page["guest"], page["token"]) != expected:
                raise Mismatch(f"{oid}:{index} was put by {expected}, not {page}")
