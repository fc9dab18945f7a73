"""The administrator's operations, called by a guest.

Tries: every operation number that there is not, Xen's numbers for control, authorization and
restore among them (0, 101, 102), with others' numbers in every field that could name a guest.  In
Xen any guest could authorize itself until 2017, and make pools for other guests.

Stopped by: no channel of a guest leads to the administrator's verbs (`hypervisor.administration`):
these are unknown operations, and faults.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guests.adversaries.raw import Raw, until_out, why
from guests.adversary import Cell
from ipc.abi import Op, ReplyFlag, Status

_FIELDS: tuple[dict[str, Any], ...] = ({}, {"index": 0xFFFF}, {"pool": 1, "index": 1}, {"oid": 1})


def run(cell: Cell) -> Iterator[None]:
    """Parameters: uuid of a pool that it is not allowed to share."""
    return until_out(cell.report, _attempts(cell))


def _attempts(cell: Cell) -> Iterator[None]:
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    uuid = cell.uuid("uuid")
    for op in sorted(set(range(256)) - {int(op) for op in Op}):
        for fields in _FIELDS:
            oid = uuid + bytes(8)
            reply = raw.call(op, **({"oid": oid} | fields))
            report["attempts"] += 1
            if reply.flags & ReplyFlag.FAULT:
                report["caught"] += 1
                report["reasons"][why(reply)] = report["reasons"].get(why(reply), 0) + 1
            else:
                report["succeeded"] += 1
        yield
    reply = raw.new_pool(uuid=uuid)
    report["attempts"] += 1
    if reply.status == Status.DONE:
        report["succeeded"] += 1
    else:
        report["caught"] += 1
        report["reasons"][why(reply)] = report["reasons"].get(why(reply), 0) + 1
