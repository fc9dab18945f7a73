"""What a node of a cluster tells people: itself, and the locks that it masters.

Everything that another node is named in has its name, not a number only.
"""

from __future__ import annotations

from typing import Any, Final

from fs.dlm.modes import Mode
from fs.ocfs2.locking import DENTRY, NAME_BYTES
from guests.node import Node

RESOURCES_MAX: Final = 10_000
"""In one answer, so that it fits into a frame of the control socket."""

KINDS: Final = {
    "M": "meta",
    "W": "write",
    "O": "open",
    "N": "dentry",
    "S": "super",
    "R": "rename",
    "F": "flock",
    "L": "ranges",
    "P": "orphan scan",
}
"""By the first letter of a lock's name, as OCFS2 has them; it has no ranges."""


def node_status(node: Node, now_ns: int) -> dict[str, Any]:
    """Number, slot, view, heartbeat, what it masters, and messages that it did not take."""
    fence = node.cluster.fence
    written_ns = fence.lease_end_ns - node.spec.timing.write_timeout_ns
    return {
        "volume": node.spec.volume,
        "number": node.spec.number,
        "slot": node.fs.slot if node.fs is not None else None,
        "epoch": node.epoch,
        "members": [_name(node, member) for member in sorted(node.members)],
        "heartbeat_age_seconds": max(0, now_ns - written_ns) / 1e9 if fence.lease_end_ns else None,
        "resources_mastered": len(node.locks.manager.resources),
        "locks_held": len(node.locks.manager.locks),
        "nodes_recovered": node.recovered_nodes,
        "orphans_freed": node.orphan_scanner.freed,
        "messages_malformed": node.malformed_messages,
        "messages_refused": node.locks.manager.refused,
        "fenced": node.fenced_because,
    }


def lock_resources(node: Node) -> dict[str, Any]:
    """The resources that this node masters: holders with their modes, waiters, token."""
    resources = node.locks.manager.resources
    rows = []
    for name, resource in sorted(resources.items())[:RESOURCES_MAX]:
        kind, inode = split_lock_name(name)
        rows.append(
            {
                "name": name.decode("ascii", "replace"),
                "kind": kind,
                "inode": inode,
                "master": _name(node, node.spec.number),
                "holders": {
                    _name(node, holder): mode.name
                    for holder, mode in sorted(resource.holders.items())
                    if mode != Mode.NL
                },
                "waiters": [
                    {"node": _name(node, waiter.node), "mode": waiter.mode.name}
                    for waiter in [*resource.converting, *resource.waiting]
                ],
                "token": resource.token,
                "held_back": [_name(node, death.node) for death in sorted(resource.deaths)],
            }
        )
    return {"resources": rows, "left_out": max(0, len(resources) - RESOURCES_MAX)}


def split_lock_name(name: bytes) -> tuple[str, int | None]:
    """Kind and inode of a lock's name; None for a name of another form."""
    kind = KINDS.get(name[:1].decode("ascii", "replace"), "other")
    if len(name) != NAME_BYTES:
        return kind, None
    try:
        return kind, int(name[17:] if name.startswith(DENTRY) else name[7:23], 16)
    except ValueError:
        return kind, None


def _name(node: Node, number: int) -> str:
    names = node.spec.names
    return names[number] if number < len(names) else f"node {number}"
