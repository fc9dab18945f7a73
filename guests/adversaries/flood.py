"""A flood of calls, as fast as the hypervisor takes them.

Tries: the dearest calls that there are, without a pause: batches of 64 gets of nothing, puts and
flushes of whole extents.  Each call keeps the one thread that serves everybody.

Stopped by: turns (`hypervisor.server`): one call of one guest at a time, and a bounded one, so a
victim's call waits for at most one of each other guest's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from guests.adversaries.raw import Raw
from guests.adversary import Cell
from ipc.abi import EXTENT_PAGES_MAX, Op


def run(cell: Cell) -> Iterator[None]:
    """Parameters: seconds."""
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0}
    pool = raw.new_pool().value
    until = time.monotonic() + cell.number("seconds", 2.0, 0.01, 600.0)
    number = 0
    yield
    while time.monotonic() < until:
        for _ in range(50):
            number += 1
            op = (Op.PUT_PAGE, Op.GET_PAGE, Op.FLUSH_PAGE)[number % 3]
            raw.call(op, pool=pool, oid=number // 3, index=0, count=EXTENT_PAGES_MAX)
        report["attempts"] += 50
        yield
