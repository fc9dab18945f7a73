"""Asking for pages of pools that are others'.

Tries: get, under every pool id there could be and under the handles that a victim uses, whatever is
there; ask for the same in a batch; destroy and flush pools by their ids.

Stopped by: pool ids are each guest's own (`hypervisor.pools`).  A guest is who its queue says, and
no field of a call names another one.
"""

from __future__ import annotations

from collections.abc import Iterator

from guests.adversaries.raw import Raw, file_oid, page_of, why
from guests.adversary import Cell
from ipc.abi import BATCH_ENTRY, Op, Status

_ODD_IDS = (-1, -2, 16, 64, 0xFFFF, 1 << 31, (1 << 31) - 1)


def run(cell: Cell) -> Iterator[None]:
    """Parameters: owner, ino, version of the pages to look for."""
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    ino = cell.count("ino", 7, 0, 2**63)
    oid = file_oid(ino, 1)
    secret = page_of(cell.text("owner"), ino, cell.count("version", 1, 0, 2**32), 0)
    own = raw.new_pool(persist=True).value
    window = raw.channel.window

    def note(reply_reason: str, *, won: bool) -> None:
        report["attempts"] += 1
        if won:
            report["succeeded"] += 1
        else:
            report["caught"] += 1
            report["reasons"][reply_reason] = report["reasons"].get(reply_reason, 0) + 1

    for pool in (*range(64), *_ODD_IDS):
        if pool == own:
            continue
        for op in (Op.GET_PAGE, Op.FLUSH_PAGE):
            reply = raw.call(op, pool=pool, oid=oid, index=0, count=1)
            note(why(reply), won=reply.status == Status.DONE)
        window.table[: BATCH_ENTRY.size] = BATCH_ENTRY.pack(pool & 0xFFFF_FFFF, 0, 0, 0, oid, 0)
        reply = raw.call(Op.GET_BATCH, count=1)
        won = bytes(window.slot(0)) == secret
        note(why(reply), won=won)
        reply = raw.call(Op.DESTROY_POOL, pool=pool)
        note(why(reply), won=reply.value > 0)
        yield
    found = raw.get(own, oid, 0)
    note("nothing there", won=found == secret)
