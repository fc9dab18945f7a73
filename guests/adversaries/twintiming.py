"""Twins: the time of a put, from which it may be told that somebody else holds the same page.

Tries: put pages of guessed content, and pages that nobody can have, and time both.  Where equal
pages are stored once, an equal page is compared and not copied, which takes another time; then the
guess is confirmed, though no bit of the page was read.  That is why Xen took deduplication out.

Stopped by: the scope of sharing (`hypervisor.sharing`): pages are one only within a group that
trusts each other, found by a hash that each group has its own key for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from guests.adversaries.raw import Raw, page_of
from guests.adversary import Cell
from ipc.abi import Op

_EXTENT = 64


def run(cell: Cell) -> Iterator[None]:
    """Parameters: owner, ino, version of the pages that are guessed right; pages, how many there
    are of them; trials, repeats.  Reports the times of both classes, in the order of the trials."""
    raw = Raw(cell)
    report = cell.report
    owner, ino = cell.text("owner"), cell.count("ino", 7, 0, 2**63)
    version, pages = cell.count("version", 1, 0, 2**32), cell.count("pages", 256, _EXTENT, 65536)
    trials, repeats = cell.count("trials", 400, 2, 10**6), cell.count("repeats", 4, 1, 100)
    pool = raw.new_pool().value
    window = raw.channel.window
    report |= {"labels": [], "times_ns": [], "refused": 0}
    clock = time.perf_counter_ns
    for trial in range(trials):
        held = cell.random.random() < 0.5
        first = cell.random.randrange(pages - _EXTENT + 1)
        for slot in range(_EXTENT):
            if held:
                window.slot(slot)[:] = page_of(owner, ino, version, first + slot)
            else:
                window.slot(slot)[:] = page_of("nobody", cell.job.random.random(), trial, slot)
        best_ns = 0
        for _ in range(repeats):
            request = raw.request(Op.PUT_PAGE, pool=pool, oid=9, count=_EXTENT)
            began_ns = clock()
            reply = raw.send(request)
            took_ns = clock() - began_ns
            best_ns = min(best_ns or took_ns, took_ns)
            report["refused"] += _EXTENT - reply.map.bit_count()
            # Gone again, so that the next put of it is a first one.
            raw.call(Op.FLUSH_OBJECT, pool=pool, oid=9)
        report["labels"].append(held)
        report["times_ns"].append(best_ns)
        yield
    raw.call(Op.DESTROY_POOL, pool=pool)
