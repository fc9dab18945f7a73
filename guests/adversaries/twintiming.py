"""Twins: the time of a put, from which it may be told that somebody else holds the same page.

Tries: put pages of guessed content, and pages that nobody can have, and time both.  Where equal
pages are stored once, an equal page is compared and not copied, which takes another time; then the
guess is confirmed, though no bit of the page was read.  That is why Xen took deduplication out.

Whatever else the machine does takes longer than the difference.  So trials are pairs: the guess and
the same pages with a few bytes changed, which nobody has, in an order that a coin decides, each put
several times by turns (A B B A), so that what drifts meets both alike; of each the shortest time
counts, for others only ever add to it.  The question is which of the two was the guess.  With
nothing to be told the coin alone decides that, whatever the noise is like: who answers is right in
half of all cases.  (With pages of quite other content more than that was told, and nothing about
anybody: how long a put takes depends by some nanoseconds on what is in the page.)

Stopped by: the scope of sharing (`hypervisor.sharing`): pages are one only within a group that
trusts each other, found by a hash that each group has its own key for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from guests.adversaries.raw import Raw, page_of
from guests.adversary import Cell
from ipc.abi import EXTENT_PAGES_MAX, Op

_OID = 9
_AT = 2048
"""Where a page differs that nobody has."""


def run(cell: Cell) -> Iterator[None]:
    """Parameters: owner, ino, version of the pages that are guessed right; pages, how many there
    are of them; trials; repeats, how often A B B A is put.  Reports of each trial whether the first
    was the guess (`labels`), and by how much it took longer (`differences_ns`)."""
    raw = Raw(cell)
    report = cell.report
    owner, ino = cell.text("owner"), cell.count("ino", 7, 0, 2**63)
    version = cell.count("version", 1, 0, 2**32)
    pages = cell.count("pages", 256, EXTENT_PAGES_MAX, 65536)
    trials, repeats = cell.count("trials", 400, 2, 10**6), cell.count("repeats", 2, 1, 100)
    pool = raw.new_pool().value
    report |= {"labels": [], "differences_ns": [], "refused": 0}
    guesses = [page_of(owner, ino, version, index) for index in range(pages)]
    for _ in range(trials):
        label = cell.random.random() < 0.5
        start = cell.random.randrange(pages - EXTENT_PAGES_MAX + 1)
        extent = guesses[start : start + EXTENT_PAGES_MAX]
        own = [page[_AT : _AT + 8] for page in extent]
        strange = [cell.random.randbytes(8) for _ in extent]
        pair = [
            b"".join(
                page[:_AT] + word + page[_AT + 8 :]
                for page, word in zip(extent, words, strict=True)
            )
            for words in ((own, strange) if label else (strange, own))
        ]
        best_ns = [1 << 62, 1 << 62]
        # The first one after the hypervisor had nothing to do is like no other.
        _time_put(raw, pool, bytes(pair[0]))
        for which in (0, 1, 1, 0) * repeats:
            best_ns[which] = min(best_ns[which], _time_put(raw, pool, pair[which]))
        report["labels"].append(label)
        report["differences_ns"].append(best_ns[0] - best_ns[1])
        yield
    raw.call(Op.DESTROY_POOL, pool=pool)


def _time_put(raw: Raw, pool: int, extent: bytes) -> int:
    """Gone again afterwards, so that the next put of it is a first one."""
    raw.channel.window.slots[:] = extent
    request = raw.request(Op.PUT_PAGE, pool=pool, oid=_OID, count=EXTENT_PAGES_MAX)
    began_ns = time.perf_counter_ns()
    reply = raw.send(request)
    took_ns = time.perf_counter_ns() - began_ns
    raw.cell.report["refused"] += EXTENT_PAGES_MAX - reply.map.bit_count()
    raw.call(Op.FLUSH_OBJECT, pool=pool, oid=_OID)
    return took_ns
