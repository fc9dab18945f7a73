"""The slot map: which node uses which slot's journal, allocators and orphan directory.

Entry n of the file `slot_map` says whether slot n is taken, and by which node. It is written in
place, not through a journal: it must be readable before any journal is replayed. Whoever reads or
changes it holds the super lock in EX.
"""

from __future__ import annotations

from typing import Final

from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.errors import corrupt
from fs.ocfs2.format import SLOT_ENTRY

_BLOCK_ENTRIES: Final = BLOCK_BYTES // SLOT_ENTRY.size
NODES_MAX: Final = 255


class SlotMap:
    """The slot map in `blocks` of the device. Nothing is cached."""

    def __init__(self, device: BlockDevice, blocks: list[int], slots: int) -> None:
        if len(blocks) * _BLOCK_ENTRIES < slots or not all(blocks):
            raise corrupt(f"the slot map has {len(blocks)} blocks for {slots} slots")
        self._device = device
        self._blocks = blocks[: -(-slots // _BLOCK_ENTRIES)]
        self._slots = slots

    def read(self) -> list[int | None]:
        """The node of each slot; None: free."""
        nodes: list[int | None] = []
        for block in self._blocks:
            data = bytearray(BLOCK_BYTES)
            self._device.read(block, 1, memoryview(data))
            for valid, node in SLOT_ENTRY.iter_unpack(data):
                nodes.append(node if valid else None)
        return nodes[: self._slots]

    def set(self, slot: int, node: int | None) -> None:
        """Give a slot to a node, or free it; durable when this returns."""
        number, index = divmod(slot, _BLOCK_ENTRIES)
        data = bytearray(BLOCK_BYTES)
        self._device.read(self._blocks[number], 1, memoryview(data))
        SLOT_ENTRY.pack_into(data, index * SLOT_ENTRY.size, node is not None, node or 0)
        self._device.write(self._blocks[number], 1, data)
        self._device.flush()

    def choose(self, node: int) -> int | None:
        """The slot for a node: the one that it left without unmounting, else the first free one."""
        nodes = self.read()
        if node in nodes:
            return nodes.index(node)
        return nodes.index(None) if None in nodes else None
