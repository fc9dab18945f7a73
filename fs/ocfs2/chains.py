"""Chain allocators: global_bitmap, inode_alloc and extent_alloc.

    dinode: chain records -> group -> group -> ...     each group: a bitmap of up to 32256 bits

A bit of the global bitmap is a cluster of the volume. A bit of another allocator is a block of a
group of 1024 clusters that came out of the global bitmap; such allocators grow by a whole group
and never shrink.

Which bit: the one asked for if it is free (`goal`), else the first free one after the place of
the last allocation, in the chain with the most free bits. Linux moves groups inside a chain to
shorten its walks; we leave them where they are.

Each count is kept in three places: group, chain record and dinode. They change together, inside
one operation. An image is not trusted: a group that isn't this allocator's, chains that form a
loop, counts that exceed what is there and bits that are freed twice are EUCLEAN.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from fs import bitmap
from fs.block.device import BLOCK_BYTES
from fs.errors import corrupt, error
from fs.ocfs2.blocks import Buffer
from fs.ocfs2.dinode import Dinodes, Ocfs2Inode
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.format import (
    CHAINS_MAX,
    GROUP_BITMAP_BYTES,
    GROUP_BITMAP_OFFSET,
    GROUP_BITS_MAX,
    GROUP_SIGNATURE,
    SUBALLOC_GROUP_CLUSTERS,
    ChainListHeader,
    ChainRecord,
    Dinode,
    GroupDescriptor,
    chain_offset,
)
from fs.ocfs2.transaction import Transactions

_ALLOCATOR: Final = InodeFlag.BITMAP | InodeFlag.CHAIN


class Group(NamedTuple):
    """A group descriptor, checked."""

    buffer: Buffer
    head: GroupDescriptor
    base: int
    """Block of bit 0."""


class Bits(NamedTuple):
    """What was allocated: `length` blocks from `block` on, `bit` and following of their group."""

    block: int
    bit: int
    length: int


class ChainAllocator:
    """One allocator. All methods want its inode locked in EX, `free_bits` in PR."""

    def __init__(
        self,
        transactions: Transactions,
        dinodes: Dinodes,
        inode: Ocfs2Inode,
        blocks: int,
        first_group: int = 0,
    ) -> None:
        self._transactions = transactions
        self._dinodes = dinodes
        self.inode = inode
        self._blocks = blocks
        self._first_group = first_group
        """Not 0: this is the global bitmap."""
        self._places: dict[int, int] = {}
        """Group -> bit behind the last allocation."""

    # Counts

    def _head(self) -> tuple[Buffer, Dinode, ChainListHeader]:
        buffer = self._dinodes.buffer(self.inode)
        raw = Dinode.read(buffer.data)
        chains = ChainListHeader.read(buffer.data)
        if (
            raw.flags & _ALLOCATOR != _ALLOCATOR
            or not 0 < chains.count <= CHAINS_MAX
            or chains.used > chains.count
            or chains.bits_per_cluster != 1
            or not 0 < chains.clusters_per_group <= GROUP_BITS_MAX
            or raw.id1_low > raw.id1_high
        ):
            raise corrupt(f"allocator {self.inode.ino} has a chain list that makes no sense")
        return buffer, raw, chains

    @property
    def free_bits(self) -> int:
        """Bits that are free, those freed since the last commit too."""
        raw = self._head()[1]
        return raw.id1_high - raw.id1_low

    @property
    def total_bits(self) -> int:
        """Bits in all groups."""
        return self._head()[1].id1_high

    # Groups

    def _group(self, block: int, chain: int | None = None) -> Group:
        if not 0 < block < self._blocks:
            raise corrupt(f"allocator {self.inode.ino} has a group in block {block}")
        buffer = self._transactions.get(block, self.inode.ino)
        head = GroupDescriptor.read(buffer.data)
        base = 0 if block == self._first_group else block
        if (
            head.signature != GROUP_SIGNATURE
            or head.block != block
            or head.generation != self._dinodes.fs_generation
            or head.parent != self.inode.ino
            or not 0 < head.bits <= min(GROUP_BITS_MAX, head.bitmap_bytes * 8)
            or head.free > head.bits
            or base + head.bits > self._blocks
            or (chain is not None and head.chain != chain)
        ):
            raise corrupt(f"allocator {self.inode.ino}: block {block} is no group of it")
        return Group(buffer, head, base)

    def _groups(self) -> Iterator[Group]:
        """All groups with free bits, those of the chain with the most first."""
        buffer, _raw, chains = self._head()
        records = [ChainRecord.read(buffer.data, chain_offset(n)) for n in range(chains.used)]
        seen: set[int] = set()
        for chain in sorted(range(chains.used), key=lambda n: -records[n].free):
            block = records[chain].block if records[chain].free else 0
            while block:
                if block in seen:
                    raise corrupt(f"allocator {self.inode.ino} has group {block} twice")
                seen.add(block)
                group = self._group(block, chain)
                if group.head.free:
                    yield group
                block = group.head.next_group

    # Allocating

    def allocate(self, count: int, goal: int = 0) -> Bits:
        """Up to `count` blocks that lie together, at block `goal` if that is free; ENOSPC."""
        assert count > 0
        if goal and self._first_group and goal < self._blocks:
            found = self._allocate_at(count, goal)
            if found is not None:
                return found
        for group in self._groups():
            bit = self._find(group, self._places.get(group.head.block, 0))
            if bit is not None:
                return self._take(group, bit, self._usable(group, bit, count))
        raise error(errno.ENOSPC, f"no free bit in allocator {self.inode.ino}")

    def _allocate_at(self, count: int, goal: int) -> Bits | None:
        per_group = self._head()[2].clusters_per_group
        number, bit = divmod(goal, per_group)
        group = self._group(number * per_group if number else self._first_group)
        if bit >= group.head.bits:
            return None
        usable = self._usable(group, bit, count)
        return self._take(group, bit, usable) if usable else None

    def allocate_whole(self, count: int) -> Bits:
        """`count` blocks (a multiple of 8) that lie together, or ENOSPC."""
        wanted = re.compile(rb"\x00{%d}" % (count // 8))
        for group in self._groups():
            if group.head.free < count:
                continue
            start = GROUP_BITMAP_OFFSET
            end = GROUP_BITMAP_OFFSET + group.head.bits // 8
            while (found := wanted.search(group.buffer.data, start, end)) is not None:
                bit = (found.start() - GROUP_BITMAP_OFFSET) * 8
                usable = self._usable(group, bit, count)
                if usable == count:
                    return self._take(group, bit, count)
                start = found.start() + usable // 8 + 1
        raise error(errno.ENOSPC, f"no {count} free clusters together")

    def _find(self, group: Group, place: int) -> int | None:
        """A free bit that may be used, from `place` on and then from the beginning."""
        bits = group.buffer.data[GROUP_BITMAP_OFFSET:]
        freed = self._transactions.freed
        for start, end in ((place, group.head.bits), (0, place)):
            bit = bitmap.find_clear(bits, start, end)
            while bit is not None and group.base + bit in freed:
                bit = bitmap.find_clear(bits, bit + 1, end)
            if bit is not None:
                return bit
        return None

    def _usable(self, group: Group, bit: int, count: int) -> int:
        bits = group.buffer.data[GROUP_BITMAP_OFFSET:]
        length = bitmap.clear_run(bits, bit, min(group.head.bits, bit + count))
        freed = self._transactions.freed
        if freed:
            for number in range(length):
                if group.base + bit + number in freed:
                    return number
        return length

    def _take(self, group: Group, bit: int, count: int) -> Bits:
        if group.head.free < count:
            raise corrupt(f"group {group.head.block} has more clear bits than it counts")
        self._transactions.modify(group.buffer)
        bits = group.buffer.data[GROUP_BITMAP_OFFSET:]
        bitmap.set_run(bits, bit, count)
        group.buffer.data[GROUP_BITMAP_OFFSET:] = bits
        self._count(group, -count)
        self._places[group.head.block] = bit + count
        return Bits(group.base + bit, bit, count)

    def _count(self, group: Group, freed: int) -> None:
        """Add `freed` to the free bits of group, chain and dinode."""
        group.head.free += freed
        group.head.contig_free = 0  # "not kept", see format
        group.head.write_into(group.buffer.data)
        buffer, raw, chains = self._head()
        if group.head.chain >= chains.used:
            raise corrupt(f"group {group.head.block} is in chain {group.head.chain}")
        offset = chain_offset(group.head.chain)
        record = ChainRecord.read(buffer.data, offset)
        if not 0 <= record.free + freed <= record.total or raw.id1_low < freed:
            raise corrupt(f"allocator {self.inode.ino} counts its free bits wrongly")
        self._transactions.modify(buffer)
        record.free += freed
        record.write_into(buffer.data, offset)
        raw.id1_low -= freed
        raw.write_into(buffer.data)

    # Freeing

    def free(self, block: int, count: int, *, bit: int | None = None) -> None:
        """Give `count` blocks back. `bit`: that of `block`, needed outside the global bitmap."""
        while count:
            if bit is None:
                per_group = self._head()[2].clusters_per_group
                number, start = divmod(block, per_group)
                group = self._group(number * per_group if number else self._first_group)
            else:
                start = bit
                group = self._group(block - bit)
            step = min(count, group.head.bits - start)
            # Bit 0 is the descriptor itself, and nothing in the first group is below it.
            if step <= 0 or (start == 0 and block == group.head.block):
                raise corrupt(f"block {block} is freed and belongs to no file")
            self._release(group, start, step)
            block += step
            count -= step

    def _release(self, group: Group, start: int, count: int) -> None:
        self._transactions.modify(group.buffer)
        bits = group.buffer.data[GROUP_BITMAP_OFFSET:]
        if bitmap.reset_run(bits, start, count) != count:
            raise corrupt(f"blocks from {group.base + start} on are freed twice")
        if group.head.free + count > group.head.bits:
            raise corrupt(f"group {group.head.block} counts too many free bits")
        group.buffer.data[GROUP_BITMAP_OFFSET:] = bits
        self._count(group, count)
        self._transactions.free(group.base + start, count)

    # Growing

    @property
    def group_clusters(self) -> int:
        """Clusters of a new group."""
        return self._head()[2].clusters_per_group

    def grow(self, clusters: ChainAllocator) -> None:
        """Add a group of clusters from the global bitmap; ENOSPC."""
        buffer, raw, chains = self._head()
        wanted = chains.clusters_per_group
        if wanted != SUBALLOC_GROUP_CLUSTERS:
            raise corrupt(f"allocator {self.inode.ino} has groups of {wanted} clusters")
        block = clusters.allocate_whole(wanted).block
        if chains.used < chains.count:
            chain = chains.used
            chains.used += 1
            record = ChainRecord()
        else:
            chain = min(
                range(chains.count),
                key=lambda n: ChainRecord.read(buffer.data, chain_offset(n)).total,
            )
            record = ChainRecord.read(buffer.data, chain_offset(chain))
        group = self._transactions.create(block, self.inode.ino)
        GroupDescriptor(
            bitmap_bytes=GROUP_BITMAP_BYTES, bits=wanted, free=wanted - 1, chain=chain,
            generation=self._dinodes.fs_generation, next_group=record.block,
            parent=self.inode.ino, block=block,
        ).write_into(group.data)  # fmt: skip
        group.data[GROUP_BITMAP_OFFSET] = 1
        self._transactions.modify(buffer)
        record.free += wanted - 1
        record.total += wanted
        record.block = block
        record.write_into(buffer.data, chain_offset(chain))
        chains.write_into(buffer.data)
        raw.id1_low += 1
        raw.id1_high += wanted
        raw.clusters += wanted
        raw.size = raw.clusters * BLOCK_BYTES
        raw.write_into(buffer.data)
        self._transactions.touch(self.inode)
        self.inode.size = raw.size
        self._dinodes.set_clusters(self.inode, raw.clusters)
