"""A giant object, made to be destroyed.

Tries: an object whose pages are as far apart as they can be, so that each has a leaf of its own,
with as many pages as there is room for; then one call that flushes all of it, again and again.
In Xen that one call walked all of it under a lock.

Stopped by: doom and reap (`hypervisor.reclaim`): a flush disowns any number of pages by one word,
and the frames come free in slices between the turns of others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from guests.adversaries.raw import Raw, page_of
from guests.adversary import Cell
from ipc.abi import Op

_LEAF_PAGES = 64


def run(cell: Cell) -> Iterator[None]:
    """Parameters: pages, seconds."""
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "flushed_pages": 0}
    pages = cell.count("pages", 1000, 1, 10**6)
    until = time.monotonic() + cell.number("seconds", 2.0, 0.01, 600.0)
    pool = raw.new_pool().value
    raw.channel.window.slot(0)[:] = page_of(cell.spec.name, "giant")
    while True:
        for number in range(pages):
            index = number * _LEAF_PAGES % (1 << 32)
            raw.call(Op.PUT_PAGE, pool=pool, oid=1, index=index, count=1)
            if number % 64 == 63:
                yield
        reply = raw.call(Op.FLUSH_OBJECT, pool=pool, oid=1)
        report["attempts"] += 1
        report["flushed_pages"] += reply.value
        yield
        if time.monotonic() >= until:
            return
