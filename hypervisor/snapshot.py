"""Everything that can be counted, as one record for the control socket."""

from __future__ import annotations

from collections.abc import Callable

from hypervisor.arena import Layout
from hypervisor.machine import Machine
from hypervisor.pools import Client
from ipc.abi import PAGE_BYTES
from ipc.codec import Record


def snapshot(machine: Machine, is_attached: Callable[[Client], bool]) -> Record:
    """Counts of the machine, its arena, its guests and of the guests that have left."""
    store = machine.store
    accounts = machine.accounts()
    return {
        "generation": machine.generation,
        "eviction": machine.policy_name,
        "hypercalls": sum(account.calls for account in accounts),
        "pages_put": sum(account.pages_put for account in accounts),
        "pages_got": sum(account.pages_got for account in accounts),
        "evictions": store.evictions,
        "arena": {
            "bytes": store.arena.bytes,
            "frames": store.frames.count,
            "free_frames": store.frames.free,
            "ephemeral_pages": store.frames.ephemeral,
            "persistent_pages": store.frames.persistent,
            "metadata_bytes": metadata_bytes(store.arena.layout, len(store.objects)),
        },
        "guests": {
            client.name: {
                "id": client.number,
                "pid": client.pid,
                "attached": is_attached(client),
                "ephemeral_pages": client.pages(persistent=False),
                "persistent_pages": client.pages(persistent=True),
                "pools": [
                    {
                        "id": pool.pool_id,
                        "type": pool.kind,
                        "pages": pool.pages,
                        "objects": len(pool.objects),
                    }
                    for pool in client.pools.values()
                ],
                **client.account.record(),
            }
            for client in machine.clients.values()
        },
        "departed": machine.departed.record(),
    }


def metadata_bytes(layout: Layout, objects: int) -> int:
    """Bytes of the segment that hold no page: everything before the frames, and the object records
    that were ever used (the rest of that table was never touched, so it takes no memory)."""
    per_object = (layout.end - layout.object_word) // layout.frames
    pages = -(-objects * per_object // PAGE_BYTES)
    return layout.data + pages * PAGE_BYTES
