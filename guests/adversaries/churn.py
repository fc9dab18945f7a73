"""Joining and leaving pools without end.

Tries: make, join and leave pools as fast as it goes, private and shared ones, with a page in each,
to use up their numbers, and with each to have everybody's shares computed anew.

Stopped by: numbers that are used again, a bounded table of each guest's own, and shares that are
not computed when a pool comes or goes (`hypervisor.membership`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from guests.adversaries.raw import Raw, page_of
from guests.adversary import Cell
from ipc.abi import Op, Status


def run(cell: Cell) -> Iterator[None]:
    """Parameters: uuid (of a pool that it may join), seconds."""
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "refused": 0}
    uuid = cell.uuid("uuid")
    until = time.monotonic() + cell.number("seconds", 2.0, 0.01, 600.0)
    yield
    while time.monotonic() < until:
        for persist, shared in ((False, None), (True, None), (False, uuid)):
            reply = raw.new_pool(persist=persist, uuid=shared)
            report["attempts"] += 1
            if reply.status != Status.DONE:
                report["refused"] += 1
                continue
            raw.put(reply.value, 3, 0, [page_of("churn", report["attempts"])])
            raw.call(Op.DESTROY_POOL, pool=reply.value)
        # And as many as it may have at once, which are all given back.
        if report["attempts"] % 60 == 0:
            pools = []
            while (reply := raw.new_pool()).status == Status.DONE:
                pools.append(reply.value)
            report["attempts"] += len(pools) + 1
            report["caught"] += 1
            for pool in pools:
                raw.call(Op.DESTROY_POOL, pool=pool)
        yield
