"""The buffer cache: a bounded number of metadata blocks in memory, written back later.

Holds what a file system reads and changes a few bytes at a time: bitmaps, inode tables,
directories, indirect blocks. Regular files' data never comes here.

Invariants:
  I1  there is one `Buffer` for a block while anyone holds a reference to it, cached or not (a
      weak map finds the ones that were evicted while in use), so a change is never made to a
      second copy;
  I2  a dirty buffer is in the cache, and leaves it only written or forgotten;
  I3  a freed block is forgotten: old metadata is never written over a block that now belongs to a
      file's data.

Eviction takes the least recently used clean buffer; when all are dirty they are written first,
all together and in ascending order of blocks, because a disk likes neighbours. Simpler than
Linux: no ageing and no thread of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from weakref import WeakValueDictionary

from fs.block.device import BlockDevice

CAPACITY_BLOCKS_MIN = 8
"""Room for the blocks of one step of work; fewer would read the same block again at once."""


class Buffer:
    """One block in memory. Change `data` in place, then tell `Buffers.dirty`."""

    __slots__ = ("__weakref__", "block", "data", "dirty")

    def __init__(self, block: int, data: bytearray) -> None:
        self.block = block
        self.data = data
        self.dirty = False


class Buffers:
    """At most `capacity_blocks` blocks of `device`, at 4096 bytes each."""

    def __init__(self, device: BlockDevice, capacity_blocks: int) -> None:
        if capacity_blocks < CAPACITY_BLOCKS_MIN:
            raise ValueError(
                f"a buffer cache needs at least {CAPACITY_BLOCKS_MIN} blocks, not {capacity_blocks}"
            )
        self._device = device
        self._capacity_blocks = capacity_blocks
        self._cached: OrderedDict[int, Buffer] = OrderedDict()
        self._live: WeakValueDictionary[int, Buffer] = WeakValueDictionary()

    def __len__(self) -> int:
        """Blocks held now."""
        return len(self._cached)

    def get(self, block: int) -> Buffer:
        """The buffer of `block`, read from the device if need be."""
        buffer = self._cached.get(block)
        if buffer is not None:
            self._cached.move_to_end(block)
            return buffer
        buffer = self._live.get(block)
        if buffer is None:
            buffer = Buffer(block, bytearray(self._device.block_bytes))
            self._device.read(block, 1, memoryview(buffer.data))
        self._insert(buffer)
        return buffer

    def zeroed(self, block: int) -> Buffer:
        """The buffer of a block that was just allocated.

        All zeros and dirty, without reading it.
        """
        buffer = self._cached.get(block) or self._live.get(block)
        if buffer is None:
            buffer = Buffer(block, bytearray(self._device.block_bytes))
        else:
            buffer.data[:] = bytes(len(buffer.data))
        self.dirty(buffer)
        return buffer

    def dirty(self, buffer: Buffer) -> None:
        """`buffer.data` was changed and has to reach the disk."""
        buffer.dirty = True
        if buffer.block in self._cached:
            self._cached.move_to_end(buffer.block)
        else:
            self._insert(buffer)

    def forget(self, first: int, count: int) -> None:
        """Blocks were freed: drop their buffers without writing them."""
        if count > len(self._cached) + len(self._live):
            blocks = [
                block for block in {*self._cached, *self._live} if first <= block < first + count
            ]
        else:
            blocks = list(range(first, first + count))
        for block in blocks:
            buffer = self._cached.pop(block, None) or self._live.get(block)
            if buffer is not None:
                buffer.dirty = False
                self._live.pop(block, None)

    def flush(self) -> None:
        """Write all dirty buffers, neighbours in one write.

        Block 0, the superblock, comes after everything else.
        """
        dirty = sorted(
            (b for b in self._cached.values() if b.dirty), key=lambda b: (b.block == 0, b.block)
        )
        start = 0
        for end in range(1, len(dirty) + 1):
            if end < len(dirty) and dirty[end].block == dirty[end - 1].block + 1:
                continue
            run = dirty[start:end]
            self._device.write(
                run[0].block,
                len(run),
                b"".join(b.data for b in run) if len(run) > 1 else run[0].data,
            )
            for buffer in run:
                buffer.dirty = False
            start = end

    def _insert(self, buffer: Buffer) -> None:
        while len(self._cached) >= self._capacity_blocks:
            self._evict()
        self._cached[buffer.block] = buffer
        self._live[buffer.block] = buffer

    def _evict(self) -> None:
        victim = next((b for b in self._cached.values() if not b.dirty), None)
        if victim is None:
            self.flush()
            victim = next(iter(self._cached.values()))
        del self._cached[victim.block]
