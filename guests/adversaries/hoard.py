"""A hoard: persistent pages, as many as can be had, which nobody can take away again.

Tries: put pages that nothing can compress or share into a persistent pool until no more are taken,
and go on trying for a while.

Stopped by: allotments and caps (`hypervisor.limits`): persistent pages count against what the guest
is entitled to, whoever else has room; reservations of others are never lent.
"""

from __future__ import annotations

from collections.abc import Iterator

from guests.adversaries.raw import Raw, page_of, why
from guests.adversary import Cell

_EXTENT = 16


def run(cell: Cell) -> Iterator[None]:
    """Parameters: pages (how many it tries to put)."""
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "kept": 0, "reasons": {}}
    pool = raw.new_pool(persist=True).value
    pages = cell.count("pages", 4096, 1, 10**6)
    report["pool"] = pool
    for first in range(0, pages, _EXTENT):
        reply = raw.put(
            pool, 1, first, [page_of(cell.spec.name, first + n) for n in range(_EXTENT)]
        )
        kept = reply.map.bit_count()
        report["attempts"] += _EXTENT
        report["kept"] += kept
        if kept < _EXTENT:
            report["caught"] += _EXTENT - kept
            report["reasons"][why(reply)] = report["reasons"].get(why(reply), 0) + _EXTENT - kept
        yield
