"""What is left of things that are gone, or were never wholly made.

Tries: what was found by reading Xen's source.  Use ids of pools that could not be made because
there are as many as there may be; join a pool twice and leave it once; go on with a pool that was
left or destroyed; leave shared pools so that their pages might stay for ever; spend what others
may hold.

Stopped by: a pool that can't be made has no id, an id that was given back leads nowhere, pages of
who leaves are an heir's (`hypervisor.membership`), and each put is the putter's to pay for.
"""

from __future__ import annotations

from collections.abc import Iterator

from guests.adversaries.raw import Raw, page_of, why
from guests.adversary import Cell
from guests.workloads.job import BadParameters
from ipc.abi import Op, Reply, Status


def run(cell: Cell) -> Iterator[None]:
    """Parameters: uuid of a pool that it may share, and that others are in."""
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    uuid = cell.uuid("uuid")

    def refused(reply: Reply) -> None:
        report["attempts"] += 1
        if reply.status in (Status.DONE, Status.MISS) and not reply.reason:
            report["succeeded"] += 1
        else:
            report["caught"] += 1
            report["reasons"][why(reply)] = report["reasons"].get(why(reply), 0) + 1

    if (joined := raw.new_pool(uuid=uuid)).status != Status.DONE:
        raise BadParameters(f"it may not share this pool ({why(joined)}); by hand: --grant")
    raw.call(Op.DESTROY_POOL, pool=joined.value)
    ids = []
    while (reply := raw.new_pool()).status == Status.DONE:
        ids.append(reply.value)
        yield
    refused(reply)
    refused(raw.new_pool(uuid=uuid))
    # The slot that the failed call might have left pointing somewhere.
    for pool in {*range(max(ids) + 1, max(ids) + 3), reply.value} - set(ids):
        refused(raw.put(pool, 1, 0, [page_of("ghost")]))
        refused(raw.call(Op.GET_PAGE, pool=pool, oid=1, count=1))
    for pool in ids:
        raw.call(Op.DESTROY_POOL, pool=pool)
    yield
    for pool in ids[:4]:
        refused(raw.put(pool, 1, 0, [page_of("ghost")]))
        refused(raw.call(Op.FLUSH_OBJECT, pool=pool, oid=1))
    twice = [raw.new_pool(uuid=uuid), raw.new_pool(uuid=uuid)]
    raw.put(twice[0].value, 99, 0, [page_of("left behind")])
    raw.call(Op.DESTROY_POOL, pool=twice[0].value)
    refused(raw.put(twice[0].value, 99, 0, [page_of("ghost")]))
    yield
    joined = twice[1]
    for _ in range(40):
        # Join, put, leave: each time with pages that nobody would ever evict, if it went wrong.
        joined = raw.new_pool(uuid=uuid)
        raw.put(joined.value, 98, 0, [page_of("pinned", number) for number in range(16)])
        raw.call(Op.DESTROY_POOL, pool=joined.value)
        yield
    refused(raw.call(Op.GET_PAGE, pool=joined.value, oid=98, count=1))
