"""Everything that can be counted, as records for the control socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypervisor.arena import Layout
from hypervisor.frames import EPHEMERAL, KINDS
from hypervisor.machine import Machine
from hypervisor.pools import Client, Member, Pool, Settings
from ipc.abi import ANY_UUID, PAGE_BYTES
from ipc.codec import Record


def snapshot(machine: Machine, is_attached: Callable[[Client], bool]) -> Record:
    """Counts of the machine, its arena, its guests and of the guests that have left."""
    store = machine.store
    accounts = machine.accounts()
    return {
        "generation": machine.generation,
        "eviction": machine.policy_name,
        "scheduling": store.victims.mode,
        "hypercalls": sum(account.calls for account in accounts),
        "pages_put": sum(account.pages_put for account in accounts),
        "pages_got": sum(account.pages_got for account in accounts),
        "evictions": store.evictions,
        "arena": arena_record(machine),
        "savings": store.contents.savings(),
        "slab": store.contents.slab_record(),
        "guests": {
            client.name: guest_record(client, attached=is_attached(client))
            for client in machine.clients.values()
        },
        "departed": machine.departed.record(),
        "quarantined_pages": dict(store.quarantined),
        "checksums": store.beside.sums,
        "damaged_pages": store.damaged_pages,
    }


def arena_record(machine: Machine) -> dict[str, Any]:
    """Frames by what they hold, pages by kind."""
    store = machine.store
    pages = [0, 0]
    for client in machine.clients.values():
        for kind in (False, True):
            pages[kind] += client.pages(persistent=kind)
    return {
        "bytes": store.arena.bytes,
        "frames": store.frames.count,
        "free_frames": store.frames.free,
        "lent_frames": store.loans.lent,
        "ephemeral_pages": pages[False],
        "persistent_pages": pages[True],
        "frames_by_kind": {name: store.frames.count_kind(kind) for kind, name in enumerate(KINDS)},
        "metadata_bytes": metadata_bytes(store.arena.layout, len(store.objects))
        + store.entries.tables * PAGE_BYTES,
    }


def guest_record(client: Client, *, attached: bool) -> dict[str, Any]:
    """A guest: its settings, what is charged to it, its pools and its account."""
    return {
        "id": client.number,
        "pid": client.pid,
        "attached": attached,
        **settings_record(client.settings),
        "ephemeral_pages": client.pages(persistent=False),
        "persistent_pages": client.pages(persistent=True),
        "lent_pages": len(client.lent),
        "cost_bytes": client.cost_bytes,
        "target_bytes": sum(member.target_bytes for member in client.charged()),
        "allotment_bytes": client.allotment_bytes,
        "persistent_bytes": client.over_bytes + client.allotment_bytes,
        "persistent_over_bytes": max(client.over_bytes, 0),
        "writeback_wanted_pages": client.wishes.writeback_pages,
        "pools": [pool_part_record(member) for member in client.members.values()],
        **client.account.record(),
    }


def settings_record(settings: Settings) -> dict[str, Any]:
    """What the administrator has set."""
    return {
        "frozen": settings.frozen,
        "weight": settings.weight,
        "cap_bytes": settings.cap_bytes,
        "reserve_bytes": settings.reserve_bytes,
        "compress": settings.compress,
        "borrow": settings.borrow,
        "priority": settings.priority.name.lower(),
        "sharing": settings.sharing.value,
        "group": settings.group,
        "balloon_bytes": settings.balloon_bytes,
    }


def pool_part_record(member: Member) -> dict[str, Any]:
    """A guest's view of one of its pools."""
    pool = member.pool
    return {
        "id": member.pool_id,
        "type": pool.kind,
        "uuid": _uuid(pool),
        "pages": pool.pages,
        "objects": len(pool.objects),
        "own_pages": member.pages,
        "cost_bytes": member.cost_bytes,
        "target_bytes": member.target_bytes,
        "weight": member.weight,
        "priority": pool.priority.name.lower(),
        "writer": member.writer and member.may_get,
    }


def pool_record(pool: Pool) -> dict[str, Any]:
    """A pool and who is in it."""
    return {
        "number": pool.number,
        "type": pool.kind,
        "uuid": _uuid(pool),
        "priority": pool.priority.name.lower(),
        "pages": pool.pages,
        "objects": len(pool.objects),
        "cost_bytes": sum(member.cost_bytes for member in pool.members.values()),
        "newest_token": 0 if pool.tokens is None else pool.tokens.newest,
        "stale_pages": 0 if pool.tokens is None else pool.tokens.stale,
        "members": [
            {
                "guest": member.client.name,
                "id": member.pool_id,
                "writer": member.writer and member.may_get,
                "pages": member.pages,
                "cost_bytes": member.cost_bytes,
                "target_bytes": member.target_bytes,
                "weight": member.weight,
                "inherited": member.heir,
            }
            for _, member in sorted(pool.members.items())
        ],
    }


def _uuid(pool: Pool) -> str:
    return "" if pool.uuid == ANY_UUID or not pool.shared else pool.uuid.hex()


def freeable_bytes(machine: Machine) -> dict[str, int]:
    """What is free, and what could be freed by dropping every ephemeral page: whole frames."""
    store = machine.store
    frames = store.frames
    free = frames.free * PAGE_BYTES
    ephemeral = frames.count_kind(EPHEMERAL) * PAGE_BYTES + store.contents.ephemeral_frame_bytes()
    return {"free_bytes": free, "ephemeral_bytes": ephemeral, "freeable_bytes": free + ephemeral}


def metadata_bytes(layout: Layout, objects: int) -> int:
    """Bytes of the segment that hold no page: everything before the frames, and the object records
    that were ever used (the rest of that table was never touched, so it takes no memory)."""
    per_object = (layout.bases - layout.object_word) // layout.frames
    pages = -(-objects * per_object // PAGE_BYTES)
    return layout.data + pages * PAGE_BYTES
