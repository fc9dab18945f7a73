"""Forged pages: wrong bytes under the handles of a file that is another guest's.

Tries: join the shared pool of a uuid (any uuid that it was told or has guessed), and put pages of
its own making under (inode, generation, index) of a file that others cache there.  Whoever gets one
of them afterwards has the adversary's bytes in place of the file's.

Stopped by: the grant (`hypervisor.auth`): who is not named may not join, a reader may not put, and
one whose grant was taken back may do neither.  A member that may write can do it; what stops that
one is the file system that verifies what it gets.
"""

from __future__ import annotations

from collections.abc import Iterator

from guests.adversaries.raw import Raw, file_oid, page_of, why
from guests.adversary import Cell
from ipc.abi import Status


def run(cell: Cell) -> Iterator[None]:
    """Parameters: uuid, ino, generation, pages, token, pool (one that was joined before)."""
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    pages = cell.count("pages", 32, 1, 65536)
    oid = file_oid(cell.count("ino", 7, 0, 2**63), cell.count("generation", 1, 0, 2**32 - 1))
    token = cell.count("token", 0, 0, 2**63)
    pool = cell.count("pool", -1, -1, 4096)
    uuid = cell.uuid("uuid")
    yield
    if pool < 0:
        reply = raw.new_pool(uuid=uuid)
        if reply.status != Status.DONE:
            # Not in: every page that it would have put is an attempt that failed.
            report |= {"attempts": pages, "caught": pages, "reasons": {why(reply): pages}}
            return
        pool = reply.value
    report["pool"] = pool
    for index in range(pages):
        reply = raw.put(pool, oid, index, [page_of(cell.spec.name, "forged", index)], token=token)
        report["attempts"] += 1
        if reply.map & 1:
            report["succeeded"] += 1
        else:
            report["caught"] += 1
            reasons = report["reasons"]
            reasons[why(reply)] = reasons.get(why(reply), 0) + 1
        yield
