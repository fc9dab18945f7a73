"""A latecomer: old pages, put by a node that lost its lock and does not know it.

Tries: the node had cached a file under its lock, was stopped, and was declared dead; another node
has changed the file since.  When it goes on it puts what it still has: bytes that were right once,
which no checksum of the page itself tells from the new ones.

Stopped by: fencing tokens (`hypervisor.tokens`): each put carries the number of the lock's last
exclusive grant, and one that is older than the newest seen for the file is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from guests.adversaries.raw import Raw, file_oid, page_of, why
from guests.adversary import Cell
from ipc.abi import Status


def run(cell: Cell) -> Iterator[None]:
    """Parameters: uuid, ino, generation, pages, owner and version of the old bytes, token."""
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    ino = cell.count("ino", 7, 0, 2**63)
    oid = file_oid(ino, cell.count("generation", 1, 0, 2**32 - 1))
    version = cell.count("version", 1, 0, 2**32)
    token = cell.count("token", 0, 0, 2**63)
    owner = cell.text("owner")
    joined = raw.new_pool(uuid=cell.uuid("uuid"))
    pages = cell.count("pages", 32, 1, 65536)
    if joined.status != Status.DONE:
        report |= {"attempts": pages, "caught": pages, "reasons": {why(joined): pages}}
        return
    pool = joined.value
    for index in range(pages):
        page = page_of(owner, ino, version, index)
        reply = raw.put(pool, oid, index, [page], token=token)
        report["attempts"] += 1
        if reply.map & 1:
            report["succeeded"] += 1
        else:
            report["caught"] += 1
            report["reasons"][why(reply)] = report["reasons"].get(why(reply), 0) + 1
        yield
