"""What people are told of a mounted file system: size, features, and the slots of a volume.

A slot's journal is told as the disk has it. One that is dirty is in use by the node that has the
slot; if that node is dead, or the slot is free, it waits to be replayed.
"""

from __future__ import annotations

from typing import Any

from fs.cluster.config import node_label
from fs.ext.filesystem import ExtFileSystem
from fs.ocfs2.filesystem import Ocfs2


def volume_status(fs: ExtFileSystem | Ocfs2, names: tuple[str, ...]) -> dict[str, Any]:
    """For `tmem fs stat`. `names` are the nodes' by number, as far as they are known."""
    space = fs.statfs()
    volume = fs if isinstance(fs, Ocfs2) else None
    return {
        "type": "ext2" if volume is None else "ocfs2",
        "uuid": fs.uuid.hex(),
        "label": "" if volume is None else volume.label,
        "block_bytes": space.block_bytes,
        "blocks": space.blocks,
        "blocks_free": space.blocks_free,
        "features": fs.features,
        "slots": [] if volume is None else _slots(volume, dict(enumerate(names))),
    }


def _slots(fs: Ocfs2, names: dict[int, str]) -> list[dict[str, Any]]:
    return [
        {
            "slot": slot,
            "node": None if node is None else names.get(node, node_label(node, names)),
            "journal": "dirty" if journal.dirty else "clean",
            "sequence": journal.sequence,
            "recoveries": journal.recoveries,
        }
        for slot, (node, journal) in enumerate(
            zip(fs.slot_nodes(), fs.journal_states(), strict=True)
        )
    ]
