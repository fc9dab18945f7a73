"""What a guest may hold, before a put is tried: its allotment and its cap.

Persistent pages count against the allotment, all pages against the cap, for which the guest's own
ephemeral pages make room first.  Near a limit replacing a page is never refused.

*Borrowing.*  Beyond its allotment a guest may have persistent pages in memory that is idle, if the
administrator trusts it to take them back when it is asked (`pressure`).  It gets free frames only,
nobody's page goes for it; never those that reservations may need, nor the last sixteenth, in which
others begin; and nothing more while it has not done what it was asked.  Without that trust it is
refused: persistent pages can't be evicted, and who ignored the request would keep what others are
entitled to.
"""

from __future__ import annotations

from typing import Final

from hypervisor.objects import NO_PAGE
from hypervisor.pools import Client, Member
from hypervisor.store import Store
from ipc.abi import PAGE_BYTES

KEPT_FREE_SHARE: Final = 16
"""One frame in so many is never lent for persistent pages."""


def may_hold(store: Store, member: Member, count: int) -> bool:
    """Whether the member's guest may be charged for `count` more whole pages; its own ephemeral and
    doomed pages make room for it, and persistent ones that can be compressed."""
    client = member.client
    bytes_ = count * PAGE_BYTES
    persistent = member.policy is None
    cap_bytes = client.settings.cap_bytes
    if not (cap_bytes or client.inherited or member.pool.shared) and (
        not persistent or member.purse.bytes + bytes_ <= client.allotment_bytes
    ):
        # What most puts come to: nobody else's pages count, and there is room.
        return True
    if store.doomed:
        # Flushed pages are charged until they are reaped.
        store.reap_until(
            lambda: (
                not (cap_bytes and client.cost_bytes + bytes_ > cap_bytes)
                and not (persistent and _held_bytes(member) + bytes_ > client.allotment_bytes)
            )
        )
    over = persistent and _held_bytes(member) + bytes_ > client.allotment_bytes
    if over and store.deferred and store.squeeze(2 * count, member):
        over = _held_bytes(member) + bytes_ > client.allotment_bytes
    if over and not _may_borrow(store, client, bytes_):
        return False
    if cap_bytes and client.cost_bytes + bytes_ > cap_bytes:
        _shrink(store, client, client.cost_bytes + bytes_ - cap_bytes)
        return client.cost_bytes + bytes_ <= cap_bytes
    return True


def _may_borrow(store: Store, client: Client, bytes_: int) -> bool:
    if not client.settings.borrow or client.wishes.writeback_pages:
        return False
    kept_frames = store.frames.count // KEPT_FREE_SHARE
    left_bytes = (store.frames.free - kept_frames) * PAGE_BYTES - bytes_
    return left_bytes >= store.reserved_bytes


def may_replace(store: Store, member: Member, number: int) -> bool:
    """Whether another page may take the place of this one though there is no room for one more: it
    is the member's own and costs as much as any, or the guest is within its limits until then.
    Else it could fill the arena with pages that cost nothing and replace them."""
    if number == NO_PAGE or store.member_of(member.pool, number) is not member:
        return False
    client = member.client
    if number < store.entries.base:
        return True
    if member.policy is None and _held_bytes(member) > client.allotment_bytes:
        return False
    return not 0 < client.settings.cap_bytes < client.cost_bytes


def _shrink(store: Store, client: Client, over_bytes: int) -> None:
    """Evict a guest's own pages until it costs so much less, or a call's worth has gone."""
    until = client.cost_bytes - over_bytes
    while client.cost_bytes > until and store.evictions_left > 0:
        victim = store.victims.choose_of(client)
        if victim is None:
            return
        pages = (client.cost_bytes - until) // PAGE_BYTES
        if not store.evict(victim, max(1, min(pages, store.evictions_left))):
            return


def _held_bytes(member: Member) -> int:
    """What counts against the allotment of a guest that puts into a persistent pool: its own pages,
    and in a shared pool those of guests that have gone for good, whoever pays for them."""
    client, pool = member.client, member.pool
    held_bytes = member.purse.bytes
    if client.inherited:
        held_bytes -= client.foreign_bytes
    if pool.shared:
        held_bytes += sum(one.cost_bytes for one in pool.members.values() if one.foreign)
    return held_bytes
