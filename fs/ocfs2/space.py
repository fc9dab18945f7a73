"""Where blocks come from: the global bitmap, and for each slot its inode and extent allocators.

Inodes and extent blocks come from the own slot's allocator. When that is full it grows by a group
out of the global bitmap; when there is no room for a group, bits of other slots' allocators are
taken ("stealing", as in Linux). What is given back goes to the allocator that it came from.

All methods that change something are called inside an operation, and ask for the locks that they
find they need (`InodeLocks.need`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from fs.errors import corrupt, error
from fs.ocfs2.chains import Bits, ChainAllocator
from fs.ocfs2.dinode import Dinodes, Ocfs2Inode
from fs.ocfs2.extents import Extents, Value
from fs.ocfs2.inodelocks import InodeLocks, Rank, Wanted
from fs.ocfs2.super import Superblock
from fs.ocfs2.transaction import Transactions

_NAMES: Final = {Rank.INODE_ALLOC: b"inode_alloc:%04d", Rank.EXTENT_ALLOC: b"extent_alloc:%04d"}


class Space:
    """The allocators of a mounted volume. `slot`: the own one."""

    def __init__(
        self,
        superblock: Superblock,
        transactions: Transactions,
        dinodes: Dinodes,
        extents: Extents,
        locks: InodeLocks,
        system: dict[bytes, Ocfs2Inode],
    ) -> None:
        self._super = superblock
        self._transactions = transactions
        self._dinodes = dinodes
        self._extents = extents
        self._locks = locks
        self._system = system
        self.slot = 0
        self.clusters = ChainAllocator(
            transactions,
            dinodes,
            system[b"global_bitmap"],
            superblock.blocks,
            superblock.first_group,
        )
        self._allocators: dict[tuple[Rank, int], ChainAllocator] = {}

    def _allocator(self, rank: Rank, slot: int) -> ChainAllocator:
        found = self._allocators.get((rank, slot))
        if found is None:
            inode = self._system[_NAMES[rank] % slot]
            found = ChainAllocator(self._transactions, self._dinodes, inode, self._super.blocks)
            self._allocators[rank, slot] = found
        return found

    # Locks that an operation is likely to need

    @property
    def wants_inode(self) -> Wanted:
        """To make an inode."""
        return Wanted(
            Rank.INODE_ALLOC, self.slot, self._allocator(Rank.INODE_ALLOC, self.slot).inode
        )

    @property
    def wants_clusters(self) -> Wanted:
        """To allocate or free clusters."""
        return Wanted(Rank.GLOBAL_BITMAP, 0, self.clusters.inode)

    # Clusters

    def _need_clusters(self) -> ChainAllocator:
        self._locks.need(Rank.GLOBAL_BITMAP, self.clusters.inode, 0)
        return self.clusters

    def extend(
        self,
        inode: Ocfs2Inode | Value,
        count: int,
        use: Callable[[int, int], None] = lambda _block, _count: None,
    ) -> None:
        """Give an inode or a value `count` more clusters at its end; the caller stores it. ENOSPC.

        `use` is told of what was found: from which block on, how many.
        """
        clusters = self._need_clusters()
        if count > clusters.free_bits:
            raise error(errno.ENOSPC, f"{count} clusters wanted, {clusters.free_bits} free")
        if isinstance(inode, Ocfs2Inode):
            self._transactions.touch(inode)
        goal = self._extents.map(inode, inode.clusters - 1, 1)[0] + 1 if inode.clusters else 0
        while count:
            found = clusters.allocate(count, goal)
            use(found.block, found.length)
            self._extents.append(inode, found.block, found.length, self)
            goal = found.block + found.length
            count -= found.length

    def extend_directory(self, directory: Ocfs2Inode) -> int:
        """One more block for a directory; returns it."""
        self.extend(directory, 1)
        return self._extents.map(directory, directory.clusters - 1, 1)[0]

    def cut(self, inode: Ocfs2Inode | Value, clusters: int, records_max: int) -> bool:
        """Free clusters from `clusters` on, in a bounded step; True when all are gone."""
        if inode.clusters > clusters:
            allocator = self._need_clusters()
            if isinstance(inode, Ocfs2Inode):
                self._transactions.touch(inode)
            for block, count in self._extents.truncate(inode, clusters, self, records_max):
                allocator.free(block, count)
                if isinstance(inode, Value) or not inode.is_file:
                    # Its blocks were in the journal: an old image must not be replayed over what
                    # comes there next.
                    self._transactions.free(block, count, metadata=True)
        return inode.clusters <= clusters

    def free_clusters(self, block: int, count: int) -> None:
        """Clusters that another node left in its local alloc or truncate log."""
        self._need_clusters().free(block, count)

    # Inodes and extent blocks

    def _allocate(self, rank: Rank) -> tuple[int, int, int]:
        own = self._allocator(rank, self.slot)
        self._locks.need(rank, own.inode, self.slot)
        found = self._one(own)
        if found is None:
            try:
                own.grow(self._need_clusters())
                found = self._one(own)
            except OSError as reason:
                if reason.errno != errno.ENOSPC:
                    raise
        if found is not None:
            return found.block, self.slot, found.bit
        for slot in range(self._super.slots):
            other = self._allocator(rank, slot)
            self._locks.need(rank, other.inode, slot)
            found = self._one(other)
            if found is not None:
                return found.block, slot, found.bit
        raise error(errno.ENOSPC, "no allocator has a free bit or can grow")

    @staticmethod
    def _one(allocator: ChainAllocator) -> Bits | None:
        if not allocator.free_bits:
            return None
        try:
            return allocator.allocate(1)
        except OSError as reason:
            if reason.errno != errno.ENOSPC:
                raise
            return None

    def _free(self, rank: Rank, block: int, slot: int, bit: int) -> None:
        if slot >= self._super.slots or bit >= block:
            raise corrupt(f"block {block} comes from bit {bit} of slot {slot}")
        allocator = self._allocator(rank, slot)
        self._locks.need(rank, allocator.inode, slot)
        allocator.free(block, 1, bit=bit)

    def allocate_inode(self) -> tuple[int, int, int]:
        """A block for an inode, the slot that it belongs to and its bit there."""
        return self._allocate(Rank.INODE_ALLOC)

    def free_inode(self, inode: Ocfs2Inode) -> None:
        """Give an inode's block back."""
        self._free(Rank.INODE_ALLOC, inode.ino, inode.suballoc_slot, inode.suballoc_bit)

    def allocate_node(self) -> tuple[int, int, int]:
        """A block for an extent block, slot and bit."""
        return self._allocate(Rank.EXTENT_ALLOC)

    def free_node(self, block: int, slot: int, bit: int) -> None:
        """Give an extent block back; its images in the journal are void."""
        self._free(Rank.EXTENT_ALLOC, block, slot, bit)
        self._transactions.free(block, 1, metadata=True)
