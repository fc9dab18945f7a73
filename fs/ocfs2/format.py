"""What OCFS2 puts on a disk: structures, magic numbers and limits of the minimal profile.

Everything is little endian (the journals inside are jbd2 and big endian: `fs.jbd2`). Blocks and
clusters are both 4 KiB here, so "cluster" and "block" count the same thing and cluster number =
block number. Offsets are those of Linux's `ocfs2_fs.h`.

Each structure is a dataclass whose fields are in the order of the disk. `read` takes it out of a
block and checks nothing but the length, `write_into` puts it back and leaves all other bytes of
the block alone. Whoever reads checks signatures and ranges: a block from a disk is untrusted.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass, fields
from typing import ClassVar, Final, NamedTuple, Self

from fs.block.device import BLOCK_BYTES
from fs.ocfs2.flags import COMPAT_USED, INCOMPAT_USED, InodeFlag

SUPER_BLOCK: Final = 2
"""Block of the superblock, which is a dinode with its own signature."""
FIRST_GROUP_BLOCK: Final = 3
"""First group descriptor of the global bitmap, and of every volume that mkfs.ocfs2 makes."""

SUPER_SIGNATURE: Final = b"OCFSV2\0\0"
DINODE_SIGNATURE: Final = b"INODE01\0"
EXTENT_BLOCK_SIGNATURE: Final = b"EXBLK01\0"
ATTRIBUTE_BLOCK_SIGNATURE: Final = b"XATTR01\0"
GROUP_SIGNATURE: Final = b"GROUP01\0"

MAJOR_REVISION: Final = 0
MINOR_REVISION: Final = 90

NAME_BYTES_MAX: Final = 255
LINKS_MAX: Final = 32000
"""Names of a file and subdirectories of a directory without the indexed-dirs feature."""
SLOTS_MAX: Final = 255
INVALID_SLOT: Final = 0xFFFF
"""`suballoc_slot` of an inode that comes from a global allocator, -1 in 16 bits."""
LABEL_BYTES: Final = 64
UUID_BYTES: Final = 16
JOURNAL_BYTES_MIN: Final = 4 << 20
HEARTBEAT_BLOCKS: Final = 256
"""Blocks of the heartbeat file; a node's sector lies in block `node`, see `fs.cluster.region`."""
TREE_DEPTH_MAX: Final = 8
"""Deeper trees are damage: at 243 records a node, depth 5 already maps 2^32 clusters."""


JOURNAL_DIRTY: Final = 0x1
"""`id1_low` of a journal dinode: the slot's journal needs recovery."""
STATE_ERRORS: Final = 0x1
"""`state` of the superblock: damage was seen."""

EXTENT_UNWRITTEN: Final = 0x1
"""Flags of a leaf record."""
EXTENT_REFCOUNTED: Final = 0x2

ID2_OFFSET: Final = 0xC0
"""Start in a dinode of what its kind decides: extent list, chain list, local alloc, ..."""
EXTENT_LIST_HEADER_BYTES: Final = 16
RECORD_BYTES: Final = 16
"""Extent records and chain records alike."""
DINODE_EXTENTS: Final = (BLOCK_BYTES - ID2_OFFSET - EXTENT_LIST_HEADER_BYTES) // RECORD_BYTES
"""243 extent records in a dinode, and as many chain records."""
EXTENT_BLOCK_LIST_OFFSET: Final = 0x30
BLOCK_EXTENTS: Final = (
    BLOCK_BYTES - EXTENT_BLOCK_LIST_OFFSET - EXTENT_LIST_HEADER_BYTES
) // RECORD_BYTES
"""252 records in an extent block."""
CHAINS_MAX: Final = DINODE_EXTENTS
GROUP_BITMAP_OFFSET: Final = 0x40
GROUP_BITMAP_BYTES: Final = BLOCK_BYTES - GROUP_BITMAP_OFFSET
GROUP_BITS_MAX: Final = GROUP_BITMAP_BYTES * 8
"""32256: clusters in a group of the global bitmap."""
SUBALLOC_GROUP_CLUSTERS: Final = (4 << 20) // BLOCK_BYTES
"""1024: clusters in a group of inode_alloc and extent_alloc: 4 MiB at any cluster size."""
LOCAL_ALLOC_BITMAP_OFFSET: Final = ID2_OFFSET + 16
LOCAL_ALLOC_BYTES: Final = BLOCK_BYTES - LOCAL_ALLOC_BITMAP_OFFSET
"""3888: `la_size` as mkfs.ocfs2 sets it."""
TRUNCATE_LOG_RECORDS: Final = (BLOCK_BYTES - ID2_OFFSET - 8) // 8
"""487: `tl_count` as mkfs.ocfs2 sets it."""
FAST_SYMLINK_BYTES_MAX: Final = BLOCK_BYTES - ID2_OFFSET - 1
"""A target of up to this many bytes lies in the dinode at ID2_OFFSET with a NUL behind it."""


class Structure:
    """Base of the structures: packs a dataclass's fields in order at a fixed offset of a block."""

    STRUCT: ClassVar[struct.Struct]
    OFFSET: ClassVar[int] = 0

    @classmethod
    def read(cls, block: bytes | bytearray | memoryview, offset: int | None = None) -> Self:
        """The structure in `block` at `offset` (default: its usual place)."""
        return cls(*cls.STRUCT.unpack_from(block, cls.OFFSET if offset is None else offset))

    def write_into(self, block: bytearray | memoryview, offset: int | None = None) -> None:
        """Put all fields back."""
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        self.STRUCT.pack_into(block, self.OFFSET if offset is None else offset, *values)


@dataclass(slots=True)
class SuperBlock(Structure):
    """The superblock proper, at ID2_OFFSET of the dinode in block 2."""

    STRUCT: ClassVar = struct.Struct("<6HIQII IIQ QII HHIQ 64s16s 4sI16s HH3I")
    OFFSET: ClassVar[int] = ID2_OFFSET

    major_revision: int = MAJOR_REVISION
    minor_revision: int = MINOR_REVISION
    mount_count: int = 0
    mount_count_max: int = 20
    state: int = 0
    errors: int = 0
    check_interval: int = 0
    last_check_s: int = 0
    creator_os: int = 0
    compat: int = int(COMPAT_USED)
    incompat: int = int(INCOMPAT_USED)
    ro_compat: int = 0
    root_block: int = 0
    system_dir_block: int = 0
    block_bits: int = 12
    cluster_bits: int = 12
    slots: int = 0
    tunefs_flag: int = 0
    uuid_hash: int = 0
    first_group: int = FIRST_GROUP_BLOCK
    label: bytes = b""
    uuid: bytes = b""
    stack: bytes = b""
    stack_flags: int = 0
    cluster: bytes = b""
    xattr_inline_bytes: int = 0
    reserved: int = 0
    seed0: int = 0
    seed1: int = 0
    seed2: int = 0


@dataclass(slots=True)
class Dinode(Structure):
    """The part of an inode block that all kinds share: bytes 0 to ID2_OFFSET."""

    STRUCT: ClassVar = struct.Struct("<8sIHH HHIII QHHI QQQQ QQ IIII IHHQ IHH QQQ QQQ II")

    signature: bytes = DINODE_SIGNATURE
    generation: int = 0
    suballoc_slot: int = INVALID_SLOT
    suballoc_bit: int = 0
    nlink_high: int = 0
    xattr_inline_bytes: int = 0
    clusters: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mode: int = 0
    nlink: int = 0
    flags: int = 0
    atime_s: int = 0
    ctime_s: int = 0
    mtime_s: int = 0
    dtime_s: int = 0
    block: int = 0
    last_extent_block: int = 0
    fs_generation: int = 0
    atime_nsec: int = 0
    ctime_nsec: int = 0
    mtime_nsec: int = 0
    attributes: int = 0
    orphaned_slot: int = 0
    dyn_features: int = 0
    xattr_block: int = 0
    check_crc32: int = 0
    check_ecc: int = 0
    check_reserved: int = 0
    dx_root: int = 0
    refcount_block: int = 0
    suballoc_group: int = 0
    """Only with the discontig-bg feature; 0 means: the group is at `block - suballoc_bit`."""
    dio_orphaned_slot: int = 0
    reserved0: int = 0
    reserved1: int = 0
    id1_low: int = 0
    """Bitmaps: bits in use. Journals: JOURNAL_DIRTY. Devices: the number."""
    id1_high: int = 0
    """Bitmaps: bits in all. Journals: how often the slot was recovered."""


class ExtentRecord(NamedTuple):
    """Clusters of a file that lie together, or (in an inner node) a subtree.

    `clusters` has 32 bits in an inner node; in a leaf 16 bits and the flags above.
    """

    first: int
    """First cluster within the file."""
    clusters: int
    block: int
    """First block on the disk, or the extent block of the subtree."""
    flags: int = 0


_RECORD = struct.Struct("<IIQ")
LEAF_CLUSTERS_MAX: Final = 0xFFFF


@dataclass(slots=True)
class ExtentListHeader(Structure):
    """In a dinode at ID2_OFFSET, in an extent block at EXTENT_BLOCK_LIST_OFFSET."""

    STRUCT: ClassVar = struct.Struct("<HHHHQ")
    OFFSET: ClassVar[int] = ID2_OFFSET

    depth: int = 0
    count: int = DINODE_EXTENTS
    used: int = 0
    """`l_next_free_rec`."""
    reserved1: int = 0
    reserved2: int = 0


def read_extent(
    block: bytes | bytearray | memoryview, list_offset: int, index: int, *, leaf: bool
) -> ExtentRecord:
    """Record `index` of the list at `list_offset`."""
    first, clusters, physical = _RECORD.unpack_from(
        block, list_offset + EXTENT_LIST_HEADER_BYTES + index * RECORD_BYTES
    )
    if leaf:
        return ExtentRecord(first, clusters & 0xFFFF, physical, clusters >> 24)
    return ExtentRecord(first, clusters, physical)


def write_extent(
    block: bytearray | memoryview, list_offset: int, index: int, record: ExtentRecord
) -> None:
    """Store a record, a leaf's (flags in the high byte) or an inner one (no flags)."""
    _RECORD.pack_into(
        block,
        list_offset + EXTENT_LIST_HEADER_BYTES + index * RECORD_BYTES,
        record.first,
        record.clusters | record.flags << 24,
        record.block,
    )


@dataclass(slots=True)
class ExtentBlock(Structure):
    """Head of a node of an extent tree; its list follows at EXTENT_BLOCK_LIST_OFFSET."""

    STRUCT: ClassVar = struct.Struct("<8sIHH HHIQ QQ")

    signature: bytes = EXTENT_BLOCK_SIGNATURE
    check_crc32: int = 0
    check_ecc: int = 0
    check_reserved: int = 0
    suballoc_slot: int = 0
    suballoc_bit: int = 0
    fs_generation: int = 0
    block: int = 0
    suballoc_group: int = 0
    next_leaf: int = 0
    """The leaf to the right; 0 in the last one and in inner nodes."""


@dataclass(slots=True)
class AttributeBlock(Structure):
    """Head of the block with an inode's extended attributes; their header follows."""

    STRUCT: ClassVar = struct.Struct("<8sHHI Q IHH HHIQ")

    signature: bytes = ATTRIBUTE_BLOCK_SIGNATURE
    suballoc_slot: int = 0
    suballoc_bit: int = 0
    fs_generation: int = 0
    block: int = 0
    check_crc32: int = 0
    check_ecc: int = 0
    check_reserved: int = 0
    flags: int = 0
    reserved0: int = 0
    reserved1: int = 0
    suballoc_group: int = 0


ATTRIBUTES_INDEXED: Final = 0x1
"""`flags` of an attribute block: too many for one block, they are in a tree of buckets."""
ATTRIBUTES_OFFSET: Final = 0x30
"""Of the header. Offsets of names are counted from here."""


@dataclass(slots=True)
class AttributesHeader(Structure):
    """The entries follow it; names and values fill the block from its end."""

    STRUCT: ClassVar = struct.Struct("<HHHH IHH")
    OFFSET: ClassVar[int] = ATTRIBUTES_OFFSET

    count: int = 0
    free_start: int = 0
    """This and the next two are kept in buckets only."""
    name_value_bytes: int = 0
    buckets: int = 0
    check_crc32: int = 0
    check_ecc: int = 0
    check_reserved: int = 0


@dataclass(slots=True)
class AttributeEntry(Structure):
    """One attribute. Its name is at `name_offset`, its value behind, both in multiples of 4."""

    STRUCT: ClassVar = struct.Struct("<IHBBQ")

    name_hash: int = 0
    name_offset: int = 0
    name_bytes: int = 0
    kind: int = 0
    """Which namespace, and ATTRIBUTE_LOCAL."""
    value_bytes: int = 0


ATTRIBUTE_LOCAL: Final = 0x80
"""The value lies behind the name; else a `ValueRoot` with one extent record does."""
ATTRIBUTE_TRUSTED: Final = 4
"""Namespace of attributes that Linux shows to root only."""
ATTRIBUTE_GAP_BYTES: Final = 4
"""Of zeros between the last entry and the first name."""


@dataclass(slots=True)
class ValueRoot(Structure):
    """Root of the extent tree of a value that lies outside; its list follows."""

    STRUCT: ClassVar = struct.Struct("<IIQ")

    clusters: int = 0
    reserved0: int = 0
    last_extent_block: int = 0


VALUE_EXTENTS: Final = 1
"""Records in the root of a value's tree."""


def name_hash(seed: int, name: bytes) -> int:
    """Of an attribute's name; the seed is the hash of the volume's uuid, whose own seed is 0."""
    for byte in name:
        seed = (seed << 5 ^ seed >> 27 ^ byte) & 0xFFFFFFFF
    return seed


@dataclass(slots=True)
class ChainListHeader(Structure):
    """Of a chain allocator, at ID2_OFFSET of its dinode; the chain records follow."""

    STRUCT: ClassVar = struct.Struct("<HHHHQ")
    OFFSET: ClassVar[int] = ID2_OFFSET

    clusters_per_group: int = 0
    bits_per_cluster: int = 1
    count: int = CHAINS_MAX
    used: int = 0
    reserved: int = 0


@dataclass(slots=True)
class ChainRecord(Structure):
    """One chain: a list of groups, linked through `GroupDescriptor.next_group`."""

    STRUCT: ClassVar = _RECORD

    free: int = 0
    total: int = 0
    block: int = 0
    """First group; 0: none."""


def chain_offset(index: int) -> int:
    """Where chain record `index` lies in the dinode."""
    return ID2_OFFSET + EXTENT_LIST_HEADER_BYTES + index * RECORD_BYTES


@dataclass(slots=True)
class GroupDescriptor(Structure):
    """Head of a block group; its bitmap (bit n: low bit first) is at GROUP_BITMAP_OFFSET.

    In inode_alloc and extent_alloc bit n stands for block `block + n`; in the global bitmap for
    cluster `n` of the group, where group g begins at cluster `g * GROUP_BITS_MAX`. Bit 0 is the
    descriptor itself, except in the first group of the global bitmap, which lies in block 3.
    """

    STRUCT: ClassVar = struct.Struct("<8sHHHH IHHQ QQ IHHQ")

    signature: bytes = GROUP_SIGNATURE
    bitmap_bytes: int = GROUP_BITMAP_BYTES
    bits: int = 0
    free: int = 0
    chain: int = 0
    generation: int = 0
    contig_free: int = 0
    """Newer writers: a lower bound or hint of the longest free run; 0 where it isn't kept."""
    reserved1: int = 0
    next_group: int = 0
    parent: int = 0
    """Block of the allocator's dinode."""
    block: int = 0
    check_crc32: int = 0
    check_ecc: int = 0
    check_reserved: int = 0
    reserved2: int = 0


@dataclass(slots=True)
class LocalAlloc(Structure):
    """Clusters that a slot took from the global bitmap in advance (we leave it empty).

    `id1_high` of the dinode: bits in the window, 0 when there is none; `id1_low`: used ones.
    """

    STRUCT: ClassVar = struct.Struct("<IHHQ")
    OFFSET: ClassVar[int] = ID2_OFFSET

    first_cluster: int = 0
    bitmap_bytes: int = LOCAL_ALLOC_BYTES
    reserved1: int = 0
    reserved2: int = 0


@dataclass(slots=True)
class TruncateLogHeader(Structure):
    """Clusters that were freed but are not yet given back (we leave it empty)."""

    STRUCT: ClassVar = struct.Struct("<HHI")
    OFFSET: ClassVar[int] = ID2_OFFSET

    count: int = TRUNCATE_LOG_RECORDS
    used: int = 0
    reserved: int = 0


TRUNCATE_RECORD: Final = struct.Struct("<II")
"""First cluster, clusters; records begin at ID2_OFFSET + 8."""

SLOT_ENTRY: Final = struct.Struct("<B3xI")
"""Extended slot map: entry n tells whether slot n is in use and by which node number."""

DIR_ENTRY: Final = struct.Struct("<QHBB")
"""Inode block (0: free), length of the entry, bytes of the name, kind; the name follows."""


def dir_entry_bytes(name_bytes: int) -> int:
    """The space of an entry: a multiple of 4."""
    return (DIR_ENTRY.size + name_bytes + 3) & ~3


FILE_TYPES: Final = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
"""Kind in a directory entry for each `S_IF...`; 0 is "unknown"."""
KINDS: Final = {number: kind for kind, number in FILE_TYPES.items()}

GLOBAL_SYSTEM_FILES: Final = (
    (b"bad_blocks", stat.S_IFREG | 0o644, InodeFlag(0)),
    (b"global_inode_alloc", stat.S_IFREG | 0o644, InodeFlag.BITMAP | InodeFlag.CHAIN),
    (b"slot_map", stat.S_IFREG | 0o644, InodeFlag(0)),
    (b"heartbeat", stat.S_IFREG | 0o644, InodeFlag.HEARTBEAT),
    (b"global_bitmap", stat.S_IFREG | 0o644, InodeFlag.BITMAP | InodeFlag.CHAIN),
)
"""Name, mode and extra flags of the files in the system directory that exist once."""
SLOT_SYSTEM_FILES: Final = (
    (b"orphan_dir:%04d", stat.S_IFDIR | 0o755, InodeFlag(0)),
    (b"extent_alloc:%04d", stat.S_IFREG | 0o644, InodeFlag.BITMAP | InodeFlag.CHAIN),
    (b"inode_alloc:%04d", stat.S_IFREG | 0o644, InodeFlag.BITMAP | InodeFlag.CHAIN),
    (b"journal:%04d", stat.S_IFREG | 0o644, InodeFlag.JOURNAL),
    (b"local_alloc:%04d", stat.S_IFREG | 0o644, InodeFlag.BITMAP | InodeFlag.LOCAL_ALLOC),
    (b"truncate_log:%04d", stat.S_IFREG | 0o644, InodeFlag.DEALLOC),
)
"""The same for the files of each slot, in the order in which mkfs.ocfs2 makes them."""
