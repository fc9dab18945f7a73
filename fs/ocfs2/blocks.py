"""The cache of metadata blocks of a mounted OCFS2, each with the inode that it belongs to.

Invariants:
  I1  there is one `Buffer` for a block while anyone holds a reference to it, cached or not (a
      weak map finds the ones that were evicted while in use);
  I2  a buffer with a change that is not in its home block on the disk yet is pinned: it is never
      evicted and never dropped;
  I3  `owner` is the block number of the inode whose meta lock protects the block. When another
      node may have changed that inode, all its blocks are dropped. A block that is asked for as
      another inode's than before is read again.

Differs from `fs.buffers`: nothing is written from here. The journal does that.
"""

from __future__ import annotations

from collections import OrderedDict
from weakref import WeakValueDictionary

from fs.block.device import BlockDevice
from fs.errors import corrupt


class Buffer:
    """One metadata block. Change `data` in place after `Transactions.modify`."""

    __slots__ = ("__weakref__", "block", "data", "owner", "pins")

    def __init__(self, block: int, owner: int, data: bytearray) -> None:
        self.block = block
        self.owner = owner
        self.data = data
        self.pins = 0
        """1 when in the running transaction, 2 when in the log and not yet home; or both."""


RUNNING = 1
LOGGED = 2


class BlockCache:
    """At most `capacity_blocks` blocks of `device` besides the pinned ones."""

    def __init__(self, device: BlockDevice, capacity_blocks: int) -> None:
        self._device = device
        self._capacity_blocks = capacity_blocks
        self._cached: OrderedDict[int, Buffer] = OrderedDict()
        self._live: WeakValueDictionary[int, Buffer] = WeakValueDictionary()
        self._of_owner: dict[int, set[int]] = {}

    def __len__(self) -> int:
        """Blocks held now."""
        return len(self._cached)

    def get(self, block: int, owner: int) -> Buffer:
        """The buffer of `block`, read from the device if need be.

        EUCLEAN for a number outside the image.
        """
        buffer = self.find(block)
        if buffer is not None and buffer.owner != owner and not buffer.pins:
            # Another node freed it with its owner, and nobody told this one to drop it.
            self.forget(block)
            buffer = None
        if buffer is None:
            if not 0 < block < self._device.blocks:
                raise corrupt(f"block {block} of {self._device.blocks} is named")
            buffer = Buffer(block, owner, bytearray(self._device.block_bytes))
            self._device.read(block, 1, memoryview(buffer.data))
        self._keep(buffer, owner)
        return buffer

    def find(self, block: int) -> Buffer | None:
        """The buffer of `block` if there is one."""
        return self._cached.get(block) or self._live.get(block)

    def create(self, block: int, owner: int) -> Buffer:
        """A buffer of zeros for a block that was just allocated; nothing is read."""
        buffer = self.find(block)
        if buffer is None:
            buffer = Buffer(block, owner, bytearray(self._device.block_bytes))
        self._keep(buffer, owner)
        return buffer

    def forget(self, block: int) -> None:
        """The block is no metadata any more, or its content is void."""
        buffer = self._cached.pop(block, None) or self._live.get(block)
        if buffer is not None:
            buffer.pins = 0
            self._live.pop(block, None)
            self._disown(buffer)

    def drop(self, owner: int) -> None:
        """Another node may have changed this inode: forget its blocks, but for pinned ones."""
        for block in list(self._of_owner.get(owner, ())):
            buffer = self.find(block)
            if buffer is None or not buffer.pins:
                self.forget(block)
        blocks = self._of_owner.get(owner)
        if blocks is not None and not any(self.find(block) for block in blocks):
            del self._of_owner[owner]

    def drop_clean(self) -> None:
        """Forget all blocks but pinned ones."""
        for owner in list(self._of_owner):
            self.drop(owner)

    def pinned(self, owner: int) -> bool:
        """True when a block of the inode is not yet home."""
        return any(
            buffer.pins
            for block in self._of_owner.get(owner, ())
            if (buffer := self._cached.get(block)) is not None
        )

    def _keep(self, buffer: Buffer, owner: int) -> None:
        if buffer.owner != owner:
            self._disown(buffer)
            buffer.owner = owner
        self._of_owner.setdefault(owner, set()).add(buffer.block)
        self._live[buffer.block] = buffer
        if buffer.block in self._cached:
            self._cached.move_to_end(buffer.block)
            return
        self._cached[buffer.block] = buffer
        if len(self._cached) > self._capacity_blocks:
            self._evict(buffer)

    def _evict(self, newest: Buffer) -> None:
        # One pass over at most a cache full of pinned blocks; `Transactions` bounds those.
        for buffer in self._cached.values():
            if not buffer.pins and buffer is not newest:
                del self._cached[buffer.block]
                self._disown(buffer)
                return

    def _disown(self, buffer: Buffer) -> None:
        blocks = self._of_owner.get(buffer.owner)
        if blocks is not None:
            blocks.discard(buffer.block)
            if not blocks:
                del self._of_owner[buffer.owner]
