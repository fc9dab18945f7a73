"""Cache thrashing: a stream of clean pages that nobody will ever want, to push out a neighbour's.

Tries: put new ephemeral pages without end.  Each put makes room for itself, and whose page goes for
it is the hypervisor's to choose.

Stopped by: shares of the arena by what pages are worth (`hypervisor.scheduler`), and reservations,
below which nobody's pages go for another guest's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from guests.adversaries.raw import Raw, page_of
from guests.adversary import Cell

_EXTENT = 32


def run(cell: Cell) -> Iterator[None]:
    """Parameters: seconds."""
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "kept": 0}
    pool = raw.new_pool().value
    until = time.monotonic() + cell.number("seconds", 2.0, 0.01, 600.0)
    first = 0
    yield
    while time.monotonic() < until:
        pages = [page_of(cell.spec.name, first + number) for number in range(_EXTENT)]
        reply = raw.put(pool, first >> 10, first, pages)
        first += _EXTENT
        report["attempts"] += _EXTENT
        report["kept"] += reply.map.bit_count()
        yield
