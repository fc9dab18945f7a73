"""The superblock and the system directory: what a mount reads before anything else.

Only the minimal profile is taken: 4 KiB blocks and clusters, an o2cb cluster with the extended
slot map, and of the optional features none but xattr, for checksums of pages, when it puts nothing
into inodes' blocks. Any other feature refuses the mount and is named in the refusal as
`mkfs.ocfs2 --fs-features` names it.
"""

from __future__ import annotations

import stat
from typing import Final

from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.errors import ImageError
from fs.ocfs2.flags import Compat, Incompat, InodeFlag, RoCompat
from fs.ocfs2.format import (
    GLOBAL_SYSTEM_FILES,
    SLOT_SYSTEM_FILES,
    SLOTS_MAX,
    SUPER_BLOCK,
    SUPER_SIGNATURE,
    Dinode,
    SuperBlock,
)

_REPAIR: Final = "repair it with fsck.ocfs2"
_COMPAT: Final = Compat.STRICT_JOURNAL_SUPER
_INCOMPAT: Final = Incompat.EXTENDED_SLOT_MAP | Incompat.CLUSTERINFO | Incompat.XATTR
_STACK: Final = b"o2cb"

_COMPAT_NAMES: Final[dict[int, str]] = {
    Compat.BACKUP_SUPER: "backup-super",
    Compat.STRICT_JOURNAL_SUPER: "strict-journal-super",
}
_NAMES: Final[dict[int, str]] = {
    Incompat.HEARTBEAT_DEVICE: "heartbeat-device",
    Incompat.RESIZE_IN_PROGRESS: "an unfinished resize",
    Incompat.LOCAL_MOUNT: "local",
    Incompat.SPARSE_ALLOC: "sparse",
    Incompat.TUNEFS_IN_PROGRESS: "an unfinished tunefs",
    Incompat.INLINE_DATA: "inline-data",
    Incompat.USERSPACE_STACK: "a userspace cluster stack",
    Incompat.EXTENDED_SLOT_MAP: "extended-slotmap",
    Incompat.XATTR: "xattr",
    Incompat.INDEXED_DIRS: "indexed-dirs",
    Incompat.META_ECC: "metaecc",
    Incompat.REFCOUNT_TREE: "refcount",
    Incompat.DISCONTIG_BG: "discontig-bg",
    Incompat.CLUSTERINFO: "clusterinfo",
    Incompat.APPEND_DIO: "append-dio",
}
_RO_NAMES: Final[dict[int, str]] = {
    RoCompat.UNWRITTEN: "unwritten",
    RoCompat.USRQUOTA: "usrquota",
    RoCompat.GRPQUOTA: "grpquota",
}


def is_ocfs2(device: BlockDevice) -> bool:
    """True when the device holds an OCFS2 volume, of whatever features and block size."""
    if device.blocks <= SUPER_BLOCK:
        return False
    head = bytearray((SUPER_BLOCK + 1) * BLOCK_BYTES)
    device.read(0, SUPER_BLOCK + 1, memoryview(head))
    return any(head[SUPER_BLOCK << bits :].startswith(SUPER_SIGNATURE[:6]) for bits in range(9, 13))


class Superblock:
    """What stays the same for as long as a volume is mounted."""

    def __init__(self, device: BlockDevice) -> None:
        if device.blocks <= SUPER_BLOCK:
            raise ImageError("is too small for an OCFS2 volume")
        data = bytearray(BLOCK_BYTES)
        device.read(SUPER_BLOCK, 1, memoryview(data))
        raw = SuperBlock.read(data)
        dinode = Dinode.read(data)
        if dinode.signature != SUPER_SIGNATURE:
            raise ImageError("has no OCFS2 superblock with 4 KiB blocks; make it with tmem mkfs")
        _check_features(raw)
        if raw.block_bits != 12 or raw.cluster_bits != 12:
            raise ImageError(
                f"has blocks of 2^{raw.block_bits} and clusters of 2^{raw.cluster_bits} bytes;"
                " make it with tmem mkfs"
            )
        self.features = _feature_names(raw)
        self.blocks = dinode.clusters
        self.fs_generation = dinode.fs_generation
        self.uuid = bytes(raw.uuid)
        self.label = bytes(raw.label).rstrip(b"\0")
        self.slots = raw.slots
        self.has_attributes = bool(raw.incompat & Incompat.XATTR)
        self.uuid_hash = raw.uuid_hash
        """Seed of the hashes of attributes' names."""
        self.root_block = raw.root_block
        self.system_dir_block = raw.system_dir_block
        self.first_group = raw.first_group
        self._check(device, dinode)

    def _check(self, device: BlockDevice, dinode: Dinode) -> None:
        if self.blocks > device.blocks:
            raise ImageError(
                f"holds {self.blocks} clusters but has room for {device.blocks};"
                " it was cut off, take a whole copy"
            )
        valid = InodeFlag.VALID | InodeFlag.SUPER_BLOCK
        if (
            dinode.block != SUPER_BLOCK
            or dinode.flags & valid != valid
            or not 0 < self.slots <= SLOTS_MAX
            or not SUPER_BLOCK < self.first_group < self.blocks
            or not SUPER_BLOCK < self.root_block < self.blocks
            or not SUPER_BLOCK < self.system_dir_block < self.blocks
            or self.root_block == self.system_dir_block
        ):
            raise ImageError(f"has a superblock that makes no sense; {_REPAIR}")


def _check_features(raw: SuperBlock) -> None:
    incompat = raw.incompat & ~_INCOMPAT
    if raw.xattr_inline_bytes:
        # Attributes may be where we have checksums.
        incompat |= raw.incompat & Incompat.XATTR
    wrong = _names("incompat", incompat, _NAMES)
    wrong += _names("ro_compat", raw.ro_compat, _RO_NAMES)
    if raw.compat & Compat.BACKUP_SUPER:
        wrong.append("backup-super")
    stack = bytes(raw.stack).rstrip(b"\0")
    if raw.incompat & Incompat.CLUSTERINFO and stack != _STACK:
        wrong.append(f"the cluster stack {stack.decode(errors='replace')!r}")
    if not raw.incompat & Incompat.EXTENDED_SLOT_MAP:
        wrong.append("a slot map that isn't extended")
    if wrong:
        raise ImageError(
            f"uses features that are not supported here: {', '.join(wrong)}; make it with tmem mkfs"
        )


def _feature_names(raw: SuperBlock) -> list[str]:
    return [
        *_names("compat", raw.compat, _COMPAT_NAMES),
        *_names("incompat", raw.incompat, _NAMES),
        *_names("ro_compat", raw.ro_compat, _RO_NAMES),
    ]


def _names(word: str, value: int, names: dict[int, str]) -> list[str]:
    bits = [1 << n for n in range(32) if value >> n & 1]
    return [names.get(bit, f"{word} {bit:#x}") for bit in bits]


def system_file_names(slots: int) -> dict[bytes, int]:
    """Name and kind (`S_IF...`) of all system files that a mount needs."""
    names = {name: stat.S_IFMT(mode) for name, mode, _flags in GLOBAL_SYSTEM_FILES}
    for pattern, mode, _flags in SLOT_SYSTEM_FILES:
        names |= {pattern % slot: stat.S_IFMT(mode) for slot in range(slots)}
    del names[b"bad_blocks"], names[b"global_inode_alloc"]
    return names
