"""Pass 0: chain allocators and their group descriptors, bits against counts."""

from __future__ import annotations

from fs.block.device import BLOCK_BYTES
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.format import (
    CHAINS_MAX,
    FIRST_GROUP_BLOCK,
    GROUP_BITMAP_BYTES,
    GROUP_BITMAP_OFFSET,
    GROUP_BITS_MAX,
    GROUP_SIGNATURE,
    ChainListHeader,
    ChainRecord,
    Dinode,
    GroupDescriptor,
    chain_offset,
)
from fs.ocfs2.fsck.volume import CheckedVolume, Group


class Allocators:
    """Reads allocators and keeps in mind which groups some of them has."""

    def __init__(self, volume: CheckedVolume) -> None:
        self._volume = volume
        self._found = volume.found
        self._seen: set[int] = set()

    def check(self, ino: int, name: str, *, is_global: bool) -> list[Group]:
        """The groups of the allocator in inode `ino`; `is_global`: the global bitmap."""
        block, raw = self._volume.dinode(ino)
        flags = InodeFlag.BITMAP | InodeFlag.CHAIN
        if raw.flags & flags != flags:
            self._found.add("SYSTEM_FILE", name, "it is not marked as a chain allocator.")
        head = ChainListHeader.read(block)
        if head.count != CHAINS_MAX:
            self._found.add("CHAIN_COUNT", name, f"it claims room for {head.count} chains.")
        if head.used > CHAINS_MAX:
            self._found.add("CHAIN_NEXT_FREE", name, f"it claims to use {head.used} chains.")
        if head.bits_per_cluster != 1:
            self._found.add("CHAIN_CPG", name, f"it has {head.bits_per_cluster} bits a cluster.")
        if is_global and head.clusters_per_group != GROUP_BITS_MAX:
            self._found.add(
                "CHAIN_CPG", name, f"its groups shall have {head.clusters_per_group} clusters."
            )
        groups: list[Group] = []
        empty: list[int] = []
        for chain in range(min(head.used, CHAINS_MAX)):
            record = ChainRecord.read(block, chain_offset(chain))
            if record.block == 0:
                empty.append(chain)
            groups += self._chain(ino, name, chain, record, head, is_global=is_global)
        if empty:
            self._found.add("CHAIN_EMPTY", name, f"{len(empty)} chains in use have no group.")
        self._check_totals(raw, name, groups, is_global=is_global)
        if is_global:
            self._check_places(name, groups)
        return groups

    def _chain(
        self,
        ino: int,
        name: str,
        chain: int,
        record: ChainRecord,
        head: ChainListHeader,
        *,
        is_global: bool,
    ) -> list[Group]:
        place = f"{name}, chain {chain}"
        groups: list[Group] = []
        own: set[int] = set()
        block, broken = record.block, False
        code = "CHAIN_HEAD_LINK_RANGE"
        while block:
            if not self._volume.is_block(block):
                self._found.add(code, place, f"it goes on in block {block}, which can't be.")
                broken = True
                break
            code = "CHAIN_LINK_RANGE"
            if block in self._seen:
                loop = "GROUP_CHAIN_LOOP" if block in own else "GROUP_DUPLICATE"
                self._found.add(loop, place, f"it has group {block}, which was there already.")
                broken = True
                break
            self._seen.add(block)
            own.add(block)
            data = self._volume.read(block)
            raw = GroupDescriptor.read(data)
            if raw.signature != GROUP_SIGNATURE:
                self._found.add("CHAIN_LINK_MAGIC", place, f"block {block} is no group descriptor.")
                broken = True
                break
            group = self._group(ino, name, chain, block, raw, data, head, is_global=is_global)
            if group is not None:
                groups.append(group)
            block = raw.next_group
        total = sum(group.bits for group in groups)
        free = total - sum(group.bitmap.bit_count() for group in groups)
        if not broken and (record.total, record.free) != (total, free):
            self._found.add(
                "CHAIN_BITS",
                place,
                f"it says {record.free} of {record.total} bits are free, its groups have"
                f" {free} of {total}.",
            )
        return groups

    def _group(
        self,
        ino: int,
        name: str,
        chain: int,
        block: int,
        raw: GroupDescriptor,
        data: bytearray,
        head: ChainListHeader,
        *,
        is_global: bool,
    ) -> Group | None:
        place = f"{name}, group {block}"
        volume = self._volume
        facts = (
            (raw.generation, volume.super.fs_generation, "GROUP_GEN", "generation"),
            (raw.parent, ino, "GROUP_PARENT", "parent"),
            (raw.block, block, "GROUP_BLKNO", "block"),
            (raw.chain, chain, "GROUP_CHAIN", "chain"),
            (raw.bitmap_bytes, GROUP_BITMAP_BYTES, "GROUP_BITS", "bitmap size"),
        )
        for value, right, code, what in facts:
            if value != right:
                self._found.add(code, place, f"its {what} is {value} and should be {right}.")
        first = 0 if is_global and block == FIRST_GROUP_BLOCK else block
        if is_global:
            right_bits = min(GROUP_BITS_MAX, volume.blocks - first)
        else:
            right_bits = min(head.clusters_per_group, GROUP_BITS_MAX)
        bits = raw.bits
        if bits != right_bits:
            self._found.add(
                "GROUP_BITS", place, f"it has {bits} bits and should have {right_bits}."
            )
            bits = min(bits, right_bits)
        bits = min(bits, volume.blocks - first)
        if bits == 0:
            return None
        bitmap = int.from_bytes(data[GROUP_BITMAP_OFFSET:BLOCK_BYTES], "little")
        bitmap &= (1 << bits) - 1
        free = bits - bitmap.bit_count()
        if raw.free != free:
            code = "GROUP_FREE_BITS"
            self._found.add(code, place, f"it says {raw.free} bits are free, its bitmap {free}.")
        if not bitmap & 1:
            self._found.add("GROUP_BITS", place, "its own bit is not set.")
        if is_global:
            if first:
                volume.own(place, "DUP_CLUSTERS_SYSFILE_CLONE", block, 1)
        else:
            new = volume.own(place, "DUP_CLUSTERS_SYSFILE_CLONE", block, bits)
            if sum(count for _start, count in new) != bits:
                # Its bits are other people's blocks: they are not looked at a second time.
                return Group(block, bits, bitmap & _only(new, block))
        return Group(block, bits, bitmap)

    def _check_totals(
        self, raw: Dinode, name: str, groups: list[Group], *, is_global: bool
    ) -> None:
        bits = sum(group.bits for group in groups)
        used = sum(group.bitmap.bit_count() for group in groups)
        if (raw.id1_low, raw.id1_high) != (used, bits):
            self._found.add(
                "CHAIN_GROUP_BITS",
                name,
                f"it says {raw.id1_low} of {raw.id1_high} bits are used, its groups have"
                f" {used} of {bits}.",
            )
        if raw.clusters != bits:
            self._found.add(
                "CHAIN_I_CLUSTERS",
                name,
                f"it says {raw.clusters} clusters, its groups have {bits}.",
            )
        if raw.size != raw.clusters * BLOCK_BYTES:
            self._found.add(
                "CHAIN_I_SIZE", name, f"its size is {raw.size} with {raw.clusters} clusters."
            )
        if is_global and raw.clusters != self._volume.blocks:
            self._found.add(
                "SUPERBLOCK_CLUSTERS",
                "superblock",
                f"it says {self._volume.blocks} clusters, the global bitmap {raw.clusters}.",
            )

    def _check_places(self, name: str, groups: list[Group]) -> None:
        expected = {FIRST_GROUP_BLOCK, *range(GROUP_BITS_MAX, self._volume.blocks, GROUP_BITS_MAX)}
        found = {group.block for group in groups}
        for block in sorted(found - expected):
            self._found.add(
                "GROUP_UNEXPECTED_DESC", f"{name}, group {block}", "no group belongs there."
            )
        for block in sorted(expected - found):
            self._found.add(
                "GROUP_EXPECTED_DESC", f"{name}, group {block}", "no chain has this group."
            )


def _only(new: list[tuple[int, int]], base: int) -> int:
    mask = 0
    for start, count in new:
        mask |= ((1 << count) - 1) << (start - base)
    return mask
