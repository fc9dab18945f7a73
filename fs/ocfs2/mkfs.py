"""Making an empty volume: the minimal profile, laid out as mkfs.ocfs2 lays it out.

    block 2       superblock                5, 6    root and system directory
    block 3       first group               7 ...   all other system inodes
    block 4       group of these inodes     273 ... directories, heartbeat, journals, slot map,
                                                    first group of inode_alloc:0000, lost+found

Group n > 0 of the global bitmap has its descriptor in its own first block; what lies across one
goes on behind it. The superblock is written last: a volume that is not finished is no volume.

Differs from mkfs.ocfs2:
  - the first two blocks are zero, and not filled with a text against OCFS version 1;
  - extent_alloc:NNNN starts without a group (mkfs.ocfs2 gives it one when the volume is large);
  - the system directory is as long as its entries, where many slots let mkfs.ocfs2 take more;
  - what the last (small) group of a volume holds is used, even if that is one cluster.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from fs.bitmap import set_run
from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.errors import ImageError
from fs.jbd2.area import Area
from fs.jbd2.journal import format_journal
from fs.ocfs2.entries import packed
from fs.ocfs2.flags import INCOMPAT_USED, Incompat, InodeFlag
from fs.ocfs2.format import (
    CHAINS_MAX,
    FIRST_GROUP_BLOCK,
    GLOBAL_SYSTEM_FILES,
    GROUP_BITMAP_OFFSET,
    GROUP_BITS_MAX,
    HEARTBEAT_BLOCKS,
    ID2_OFFSET,
    INVALID_SLOT,
    JOURNAL_BYTES_MIN,
    LABEL_BYTES,
    SLOT_SYSTEM_FILES,
    SUBALLOC_GROUP_CLUSTERS,
    SUPER_BLOCK,
    SUPER_SIGNATURE,
    UUID_BYTES,
    ChainListHeader,
    ChainRecord,
    Dinode,
    ExtentListHeader,
    ExtentRecord,
    GroupDescriptor,
    LocalAlloc,
    SuperBlock,
    TruncateLogHeader,
    chain_offset,
    name_hash,
    write_extent,
)

SLOTS_MAX: Final = 32
"""Nodes that we make room for. The format takes 255."""
JOURNAL_BYTES_MAX: Final = 256 << 20
STACK: Final = b"o2cb"
CLUSTER_NAME_BYTES: Final = 16

_SYSTEM_GROUP_BLOCK: Final = 4
_ROOT_BLOCK: Final = 5
_SYSTEM_DIR_BLOCK: Final = 6
_SYSTEM_GROUP_CLUSTERS: Final = 269
"""As mkfs.ocfs2: room for the system inodes of some 40 slots."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a volume shall be like. `generation` tells its inodes from those of an older volume."""

    slots: int
    uuid: bytes
    generation: int
    now_s: int
    label: bytes = b""
    cluster: bytes = b""
    """Name of the o2cb cluster; with one, the volume has the feature clusterinfo."""
    journal_bytes: int = JOURNAL_BYTES_MIN
    attributes: bool = False
    """With the feature xattr: files of any size can have checksums of their pages. Linux is told
    to put no attribute into an inode's block, where our own things are."""

    def check(self) -> None:
        """Raise `ImageError` for what can't be."""
        if not 1 <= self.slots <= SLOTS_MAX:
            raise ImageError(f"can't have {self.slots} slots; take 1 to {SLOTS_MAX}")
        if len(self.uuid) != UUID_BYTES:
            raise ImageError(f"needs a uuid of {UUID_BYTES} bytes, not {len(self.uuid)}")
        if len(self.label) > LABEL_BYTES or b"\0" in self.label:
            raise ImageError(f"can't have this label; take at most {LABEL_BYTES} bytes, none of 0")
        if self.cluster and not (
            len(self.cluster) <= CLUSTER_NAME_BYTES
            and self.cluster.isalnum()
            and self.cluster.isascii()
        ):
            raise ImageError(
                f"can't have this cluster name; take at most {CLUSTER_NAME_BYTES} letters and"
                " digits"
            )
        if (
            self.journal_bytes % BLOCK_BYTES
            or not JOURNAL_BYTES_MIN <= self.journal_bytes <= JOURNAL_BYTES_MAX
        ):
            raise ImageError(
                f"can't have journals of {self.journal_bytes} bytes; take {JOURNAL_BYTES_MIN >> 20}"
                f" to {JOURNAL_BYTES_MAX >> 20} MiB, whole blocks"
            )


def make_volume(device: BlockDevice, parameters: Parameters, *, fresh: bool = False) -> None:
    """Put an empty volume on the whole of `device`.

    `fresh` promises that the device reads as zeros, and leaves the journals' logs unwritten.
    Raises `ImageError` (one line that begins with what is wrong).
    """
    parameters.check()
    needed = blocks_needed(parameters)
    if device.blocks < needed:
        raise ImageError(
            f"is too small: {parameters.slots} slots with journals of"
            f" {parameters.journal_bytes >> 20} MiB need {-(-needed * BLOCK_BYTES >> 20)} MiB"
        )
    if device.blocks >= 1 << 32:
        raise ImageError("is too large: a volume has at most 2^32 - 1 clusters of 4 KiB")
    # The old superblock goes first, so that a half made volume is not taken for the old one.
    device.write(0, 3, bytes(3 * BLOCK_BYTES))
    device.flush()
    volume = _Volume(device.blocks, parameters)
    volume.build()
    for journal in volume.journals:
        format_journal(Area(device, journal), parameters.uuid, started=True, zero=not fresh)
    if not fresh:
        for start, count in volume.to_clear:
            device.write(start, count, bytes(count * BLOCK_BYTES))
    superblock = volume.blocks.pop(SUPER_BLOCK)
    for number, block in sorted(volume.blocks.items()):
        device.write(number, 1, block)
    device.flush()
    device.write(SUPER_BLOCK, 1, superblock)
    device.flush()


def blocks_needed(parameters: Parameters) -> int:
    """Blocks of the smallest volume with these parameters and a little room for files."""
    slots = parameters.slots
    used = (
        _SYSTEM_GROUP_BLOCK
        + _SYSTEM_GROUP_CLUSTERS
        + 4
        + HEARTBEAT_BLOCKS
        + slots * (1 + parameters.journal_bytes // BLOCK_BYTES)
        + 1
        + 2 * SUBALLOC_GROUP_CLUSTERS
    )
    return used + 2 * (used // GROUP_BITS_MAX) + 256


@dataclass(slots=True)
class _Inode:
    """A system inode to be."""

    block: int
    name: bytes
    mode: int
    flags: InodeFlag
    extents: list[tuple[int, int]] = field(default_factory=list)

    @property
    def clusters(self) -> int:
        return sum(count for _start, count in self.extents)


class _Volume:
    """The blocks of a new volume, in memory; block images that stay zero are not in it."""

    def __init__(self, blocks: int, parameters: Parameters) -> None:
        self._clusters = blocks
        self._parameters = parameters
        self.blocks: dict[int, bytearray] = {}
        self.journals: list[list[int]] = []
        self.to_clear: list[tuple[int, int]] = []
        self._used: list[tuple[int, int]] = [(0, _SYSTEM_GROUP_BLOCK + _SYSTEM_GROUP_CLUSTERS)]
        self._next = _SYSTEM_GROUP_BLOCK + _SYSTEM_GROUP_CLUSTERS

    # Space

    def _take(self, count: int, *, whole: bool = False) -> list[tuple[int, int]]:
        """The next clusters that are no group descriptors; `whole`: as one run."""
        runs = []
        while count:
            border = (self._next // GROUP_BITS_MAX + 1) * GROUP_BITS_MAX
            step = min(count, border - self._next)
            if whole and step < count:
                self._next = border + 1
                continue
            runs.append((self._next, step))
            self._next += step
            count -= step
            if self._next == border:
                self._next += 1
        self._used += runs
        return runs

    # Blocks

    def build(self) -> None:
        """Lay everything out."""
        files = self._system_files()
        root = _Inode(_ROOT_BLOCK, b"", stat.S_IFDIR | 0o755, InodeFlag.SYSTEM)
        system = _Inode(_SYSTEM_DIR_BLOCK, b"", stat.S_IFDIR | 0o755, InodeFlag.SYSTEM)
        named = {file.name: file for file in files}
        slots = range(self._parameters.slots)
        entries = [(file.block, file.name, file.mode) for file in files]
        system_blocks = packed(_SYSTEM_DIR_BLOCK, _SYSTEM_DIR_BLOCK, entries)
        root.extents = self._take(1)
        system.extents = self._take(len(system_blocks), whole=True)
        named[b"heartbeat"].extents = self._take(HEARTBEAT_BLOCKS)
        orphan_dirs = [named[b"orphan_dir:%04d" % slot] for slot in slots]
        for directory in orphan_dirs:
            directory.extents = self._take(1)
            self._put(directory, packed(directory.block, _SYSTEM_DIR_BLOCK, []))
        for slot in slots:
            journal = named[b"journal:%04d" % slot]
            journal.extents = self._take(self._parameters.journal_bytes // BLOCK_BYTES)
            self.journals.append(_blocks_of(journal.extents))
        named[b"slot_map"].extents = self._take(1)
        self.to_clear += named[b"slot_map"].extents + named[b"heartbeat"].extents
        [(group, _)] = self._take(SUBALLOC_GROUP_CLUSTERS, whole=True)
        lost = _Inode(group + 1, b"lost+found", stat.S_IFDIR | 0o755, InodeFlag(0))
        lost.extents = self._take(1)
        self._put(lost, packed(lost.block, _ROOT_BLOCK, []))
        self._put(root, packed(_ROOT_BLOCK, _ROOT_BLOCK, [(lost.block, lost.name, lost.mode)]))
        self._put(system, system_blocks)

        self._write_dinode(root, links=3)
        self._write_dinode(system, links=2 + len(orphan_dirs))
        self._write_dinode(lost, links=2, slot=0, group=group)
        for file in files:
            links = 2 if stat.S_ISDIR(file.mode) else 1
            self._write_dinode(file, links=links)
        self._write_allocator(
            named[b"global_inode_alloc"],
            _SYSTEM_GROUP_CLUSTERS,
            [(_SYSTEM_GROUP_BLOCK, 1 + 2 + len(files))],
        )
        for slot in slots:
            groups = [(group, 2)] if slot == 0 else []
            inode_alloc = named[b"inode_alloc:%04d" % slot]
            self._write_allocator(inode_alloc, SUBALLOC_GROUP_CLUSTERS, groups)
            extent_alloc = named[b"extent_alloc:%04d" % slot]
            self._write_allocator(extent_alloc, SUBALLOC_GROUP_CLUSTERS, [])
        self._write_global_bitmap(named[b"global_bitmap"])
        self._write_superblock()

    def _system_files(self) -> list[_Inode]:
        """All of them, in the order of the system directory and of their blocks."""
        wanted = list(GLOBAL_SYSTEM_FILES)
        for pattern, mode, flags in SLOT_SYSTEM_FILES:
            wanted += [(pattern % slot, mode, flags) for slot in range(self._parameters.slots)]
        first = _SYSTEM_DIR_BLOCK + 1
        return [
            _Inode(block, name, mode, flags | InodeFlag.SYSTEM)
            for block, (name, mode, flags) in enumerate(wanted, first)
        ]

    def _put(self, inode: _Inode, contents: Iterable[bytearray]) -> None:
        self.blocks.update(zip(_blocks_of(inode.extents), contents, strict=True))

    def _write_dinode(
        self, inode: _Inode, *, links: int, slot: int = INVALID_SLOT, group: int = 0
    ) -> None:
        block = bytearray(BLOCK_BYTES)
        now_s = self._parameters.now_s
        Dinode(
            generation=self._parameters.generation,
            suballoc_slot=slot,
            suballoc_bit=inode.block - (group or _SYSTEM_GROUP_BLOCK),
            clusters=inode.clusters,
            size=inode.clusters * BLOCK_BYTES,
            mode=inode.mode,
            nlink=links,
            flags=InodeFlag.VALID | inode.flags,
            atime_s=now_s,
            ctime_s=now_s,
            mtime_s=now_s,
            block=inode.block,
            fs_generation=self._parameters.generation,
            suballoc_group=group,
        ).write_into(block)
        if inode.flags & InodeFlag.LOCAL_ALLOC:
            LocalAlloc().write_into(block)
        elif inode.flags & InodeFlag.DEALLOC:
            TruncateLogHeader().write_into(block)
        elif not inode.flags & InodeFlag.CHAIN:
            ExtentListHeader(used=len(inode.extents)).write_into(block)
            first = 0
            for index, (start, count) in enumerate(inode.extents):
                write_extent(block, ID2_OFFSET, index, ExtentRecord(first, count, start))
                first += count
        self.blocks[inode.block] = block

    # Allocators

    def _write_allocator(
        self, inode: _Inode, clusters_per_group: int, groups: Sequence[tuple[int, int]]
    ) -> None:
        """An inode allocator; of each of its groups the block and the bits used at its start."""
        self._write_groups(
            inode,
            clusters_per_group,
            [(block, clusters_per_group, [(0, used)]) for block, used in groups],
        )

    def _write_global_bitmap(self, inode: _Inode) -> None:
        groups = []
        for first in range(0, self._clusters, GROUP_BITS_MAX):
            bits = min(GROUP_BITS_MAX, self._clusters - first)
            runs = [] if first == 0 else [(0, 1)]
            for start, count in self._used:
                low, high = max(start, first), min(start + count, first + bits)
                if low < high:
                    runs.append((low - first, high - low))
            groups.append((first or FIRST_GROUP_BLOCK, bits, runs))
        self._write_groups(inode, GROUP_BITS_MAX, groups)

    def _write_groups(
        self,
        inode: _Inode,
        clusters_per_group: int,
        groups: Sequence[tuple[int, int, list[tuple[int, int]]]],
    ) -> None:
        """Descriptors (block, bits, runs in use) and the chains that they are dealt out to."""
        chains = [ChainRecord() for _ in groups[:CHAINS_MAX]]
        used_in_all = 0
        for number, (block, bits, runs) in enumerate(groups):
            used = sum(count for _start, count in runs)
            used_in_all += used
            record = chains[number % CHAINS_MAX]
            record.block = record.block or block
            record.total += bits
            record.free += bits - used
            behind = number + CHAINS_MAX
            image = bytearray(BLOCK_BYTES)
            for start, count in runs:
                set_run(image, GROUP_BITMAP_OFFSET * 8 + start, count)
            GroupDescriptor(
                bits=bits,
                free=bits - used,
                chain=number % CHAINS_MAX,
                generation=self._parameters.generation,
                next_group=groups[behind][0] if behind < len(groups) else 0,
                parent=inode.block,
                block=block,
            ).write_into(image)
            self.blocks[block] = image
        head = self.blocks[inode.block]
        ChainListHeader(clusters_per_group=clusters_per_group, used=len(chains)).write_into(head)
        for number, record in enumerate(chains):
            record.write_into(head, chain_offset(number))
        dinode = Dinode.read(head)
        dinode.clusters = dinode.id1_high = sum(record.total for record in chains)
        dinode.id1_low = used_in_all
        dinode.size = dinode.clusters * BLOCK_BYTES
        dinode.write_into(head)

    def _write_superblock(self) -> None:
        parameters = self._parameters
        block = bytearray(BLOCK_BYTES)
        Dinode(
            signature=SUPER_SIGNATURE,
            generation=parameters.generation,
            suballoc_bit=0xFFFF,
            clusters=self._clusters,
            flags=InodeFlag.VALID | InodeFlag.SYSTEM | InodeFlag.SUPER_BLOCK,
            ctime_s=parameters.now_s,
            mtime_s=parameters.now_s,
            block=SUPER_BLOCK,
            fs_generation=parameters.generation,
        ).write_into(block)
        named = bool(parameters.cluster)
        SuperBlock(
            last_check_s=parameters.now_s,
            incompat=INCOMPAT_USED
            | (Incompat.CLUSTERINFO if named else 0)
            | (Incompat.XATTR if parameters.attributes else 0),
            root_block=_ROOT_BLOCK,
            system_dir_block=_SYSTEM_DIR_BLOCK,
            slots=parameters.slots,
            uuid_hash=name_hash(0, parameters.uuid) if parameters.attributes else 0,
            label=parameters.label,
            uuid=parameters.uuid,
            stack=STACK if named else b"",
            cluster=parameters.cluster,
        ).write_into(block)
        self.blocks[SUPER_BLOCK] = block


def _blocks_of(extents: Iterable[tuple[int, int]]) -> list[int]:
    return [block for start, count in extents for block in range(start, start + count)]
