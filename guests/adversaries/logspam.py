"""Broken calls without end, each of which the hypervisor has to write down.

Tries: make the audit log as long as the disk is.

Stopped by: a bucket of lines for each guest (`hypervisor.audit`), what does not fit is counted; the
log is turned over; and who breaks too many rules is thrown out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from guests.adversaries.raw import Raw, until_out
from guests.adversary import Cell
from ipc.abi import ReplyFlag


def run(cell: Cell) -> Iterator[None]:
    """Parameters: calls, seconds (the most it takes)."""
    return until_out(cell.report, _spam(cell))


def _spam(cell: Cell) -> Iterator[None]:
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0}
    calls = cell.count("calls", 5000, 1, 10**7)
    until = time.monotonic() + cell.number("seconds", 5.0, 0.01, 600.0)
    yield
    for number in range(calls):
        reply = raw.call(0xEE, oid=number.to_bytes(24, "little"))
        report["attempts"] += 1
        report["caught"] += reply.flags == ReplyFlag.FAULT
        if number % 64 == 63:
            yield
        if time.monotonic() >= until:
            return
