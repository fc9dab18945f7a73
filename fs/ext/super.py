"""The superblock: geometry, features, free counts and state of an ext2 file system.

1024 bytes at offset 1024 of the image, little endian, so with 4 KiB blocks it is inside block 0.
Field offsets after Linux's `Documentation/filesystems/ext4/super.rst`. Only the fields that
Linux's ext2 changes are written back; all other bytes of block 0 stay as they were found. The
copies in other groups (sparse_super) are not touched, as Linux doesn't either: e2fsck uses them
when block 0 is lost.

State, as Linux handles it: a writable mount clears VALID and writes that at once; unmount sets
VALID again, unless the image was not valid before or damage was found meanwhile, so that e2fsck
looks at it.
"""

from __future__ import annotations

import struct
from typing import Final

from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.buffers import Buffer, Buffers
from fs.errors import ImageError, corrupt
from fs.ext import features

OFFSET: Final = 1024
MAGIC: Final = 0xEF53
ROOT_INO: Final = 2
STATE_VALID: Final = 1
STATE_ERROR: Final = 2
ERRORS_CONTINUE: Final = 1
GROUP_BITS_MAX: Final = BLOCK_BYTES * 8
"""A bitmap is one block."""
POINTERS: Final = BLOCK_BYTES // 4
"""Block numbers in an indirect block."""

_HEAD = struct.Struct(
    "<7I4x3I"
)  # inodes, blocks, reserved, free blocks, free inodes, first data block, log size; ...
_REV1 = struct.Struct(
    "<IHHIII16s"
)  # 84: first_ino, inode_size, block_group_nr, compat, incompat, ro_compat, uuid


class Superblock:
    """A checked superblock. Raises `ImageError` when the image can't be mounted."""

    inodes: int
    blocks: int
    free_blocks: int
    free_inodes: int
    group_blocks: int
    group_inodes: int
    revision: int
    uuid: bytes
    reserved_gdt_blocks: int
    inode_bytes: int
    first_ino: int

    def __init__(self, buffers: Buffers, device: BlockDevice) -> None:
        self._buffers = buffers
        self._buffer: Buffer = buffers.get(0)
        raw = self._buffer.data
        if struct.unpack_from("<H", raw, OFFSET + 56)[0] != MAGIC:
            raise ImageError(
                "is not an ext2 file system (no magic number); make one with mke2fs -t ext2 -b 4096"
            )
        (
            self.inodes,
            self.blocks,
            self.reserved_blocks,
            self.free_blocks,
            self.free_inodes,
            self.first_data_block,
            self._log_block,
            self.group_blocks,
            _frags,
            self.group_inodes,
        ) = _HEAD.unpack_from(raw, OFFSET)
        self.mount_count, _max, _magic, self._state, self._on_error = struct.unpack_from(
            "<HhHHH", raw, OFFSET + 52
        )
        self.creator, self.revision = struct.unpack_from("<II", raw, OFFSET + 72)
        first_ino, inode_bytes, _group, compat, incompat, ro_compat, self.uuid = _REV1.unpack_from(
            raw, OFFSET + 84
        )
        if self.revision == 0:
            first_ino, inode_bytes, compat, incompat, ro_compat = 11, 128, 0, 0, 0
        self.first_ino = first_ino
        self.inode_bytes = inode_bytes
        self.ro_compat: int = ro_compat
        self.has_filetype = bool(incompat & features.INCOMPAT_FILETYPE)
        self.sparse = bool(ro_compat & features.RO_COMPAT_SPARSE_SUPER)
        (self.reserved_gdt_blocks,) = (
            struct.unpack_from("<H", raw, OFFSET + 206) if self.revision else (0,)
        )
        self.read_only = device.read_only
        self.was_valid = bool(self._state & STATE_VALID) and not self._state & STATE_ERROR
        self.damaged = False
        self._incompat: int = incompat
        self._compat: int = compat
        self._check_features(compat, incompat)
        self._check_geometry(device)

    @property
    def features(self) -> list[str]:
        """The names of the features that are set."""
        return features.names(self._compat, self._incompat, self.ro_compat)

    def _check_features(self, compat: int, incompat: int) -> None:
        if self.revision > 1:
            raise ImageError(
                f"has the unknown revision {self.revision};"
                " make it again with mke2fs -t ext2 -b 4096"
            )
        unknown = features.unknown(compat, incompat, self.ro_compat)
        if unknown:
            raise ImageError(
                f"uses features that are not supported: {', '.join(unknown)};"
                " make it with mke2fs -t ext2 -b 4096"
            )
        if self._log_block != 2:
            size = f"{1024 << self._log_block}-byte" if self._log_block <= 6 else "impossibly large"
            raise ImageError(
                f"has {size} blocks, only 4096 is supported; make it with mke2fs -b 4096"
            )

    def _check_geometry(self, device: BlockDevice) -> None:
        wrong = ""
        if self.first_data_block != 0:
            wrong = f"first data block {self.first_data_block}"
        elif not 8 <= self.group_blocks <= GROUP_BITS_MAX or self.group_blocks % 8:
            wrong = f"{self.group_blocks} blocks per group"
        elif (
            self.inode_bytes < 128
            or self.inode_bytes > BLOCK_BYTES
            or self.inode_bytes & (self.inode_bytes - 1)
        ):
            wrong = f"inodes of {self.inode_bytes} bytes"
        elif not 8 <= self.group_inodes <= GROUP_BITS_MAX or self.group_inodes % 8:
            wrong = f"{self.group_inodes} inodes per group"
        elif self.blocks < 8 or self.inodes != self.groups * self.group_inodes:
            wrong = (
                f"{self.blocks} blocks and {self.inodes} inodes in groups of {self.group_inodes}"
            )
        elif not 11 <= self.first_ino <= self.inodes:
            wrong = f"first inode {self.first_ino}"
        elif self.gdt_blocks + self.reserved_gdt_blocks + 4 > min(self.group_blocks, self.blocks):
            wrong = f"{self.gdt_blocks}+{self.reserved_gdt_blocks} blocks of group descriptors"
        elif self.free_blocks > self.blocks or self.free_inodes > self.inodes:
            wrong = (
                f"{self.free_blocks} free blocks of {self.blocks},"
                f" {self.free_inodes} free inodes of {self.inodes}"
            )
        if wrong:
            raise ImageError(f"has a damaged superblock ({wrong}); repair it with e2fsck")
        if self.blocks > device.blocks:
            raise ImageError(
                f"is truncated: the file system has {self.blocks} blocks, the file only"
                f" {device.blocks}; restore it or make it again with mke2fs"
            )

    @property
    def groups(self) -> int:
        """Number of block groups."""
        return -(-self.blocks // self.group_blocks)

    @property
    def gdt_blocks(self) -> int:
        """Blocks of group descriptors (32 bytes each), which follow block 0."""
        return -(-self.groups * 32 // BLOCK_BYTES)

    def group_has_copy(self, group: int) -> bool:
        """True when `group` starts with a copy of the superblock and descriptors.

        With sparse_super those are group 0, 1 and the powers of 3, 5 and 7.
        """
        if group <= 1 or not self.sparse:
            return True
        for base in (3, 5, 7):
            power = base
            while power < group:
                power *= base
            if power == group:
                return True
        return False

    def damage(self, what: str) -> OSError:
        """Note that the metadata is damaged and return the error to raise.

        The image is marked for e2fsck. Unless it asks to continue, nothing more is changed.
        """
        self.damaged = True
        if self._on_error != ERRORS_CONTINUE:
            self.read_only = True
        return corrupt(what)

    def need_large_file(self) -> None:
        """A file reached 2 GiB: the image now has the large_file feature, as Linux sets it."""
        if self.revision >= 1:
            self.ro_compat |= features.RO_COMPAT_LARGE_FILE

    def mounted(self, now_s: int) -> None:
        """Mark the image as mounted for writing."""
        self._state &= ~STATE_VALID
        self.mount_count = (self.mount_count + 1) & 0xFFFF
        struct.pack_into("<I", self._buffer.data, OFFSET + 44, now_s & 0xFFFFFFFF)
        self.store(now_s)

    def unmounted(self, now_s: int) -> None:
        """Mark the image as cleanly unmounted, unless it needs e2fsck."""
        if self.was_valid and not self.damaged:
            self._state |= STATE_VALID
        self.store(now_s)

    def store(self, now_s: int) -> None:
        """Put the fields that changed into block 0."""
        raw = self._buffer.data
        if self.damaged:
            self._state |= STATE_ERROR
        struct.pack_into("<II", raw, OFFSET + 12, self.free_blocks, self.free_inodes)
        struct.pack_into("<I", raw, OFFSET + 48, now_s & 0xFFFFFFFF)
        struct.pack_into("<H", raw, OFFSET + 52, self.mount_count)
        struct.pack_into("<H", raw, OFFSET + 58, self._state)
        if self.revision >= 1:
            struct.pack_into("<I", raw, OFFSET + 100, self.ro_compat)
        self._buffers.dirty(self._buffer)
