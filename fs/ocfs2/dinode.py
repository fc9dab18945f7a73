"""Inodes: blocks with "INODE01" on the disk, `Ocfs2Inode` in memory.

The number of an inode is the number of its block. The root of its extent tree, the chain list of
an allocator and the text of a short symbolic link stay in the block and are read and changed
there; `Ocfs2Inode` holds what `stat` shows and a few words more.

An image is not trusted: an inode whose block says another number, another volume's generation,
an unknown kind or more data than the disk has is EUCLEAN.
"""

from __future__ import annotations

import errno
import stat
from array import array
from dataclasses import dataclass, field
from typing import Final

from fs.block.device import BLOCK_BYTES
from fs.errors import corrupt, error
from fs.inode import SECTOR_BYTES, Inode
from fs.ocfs2 import checksumarea
from fs.ocfs2.blocks import Buffer
from fs.ocfs2.flags import DynFeature, InodeFlag
from fs.ocfs2.format import (
    DINODE_SIGNATURE,
    FAST_SYMLINK_BYTES_MAX,
    FILE_TYPES,
    ID2_OFFSET,
    Dinode,
    ExtentListHeader,
)
from fs.ocfs2.transaction import Transactions

CLUSTER_SECTORS: Final = BLOCK_BYTES // SECTOR_BYTES
FILE_CLUSTERS_MAX: Final = 0xFFFFFFFF
_NS: Final = 1_000_000_000


class FileChecksums:
    """Of the pages of a file, as far as they were needed (`fs.ocfs2.checksums`)."""

    __slots__ = ("chunks", "dirty", "epoch", "salt")

    def __init__(self, salt: bytes, epoch: int) -> None:
        self.salt = salt
        self.epoch = epoch
        """Of the blocks that have them; 0: those on the disk are in the inode's block."""
        self.chunks: dict[int, array[int]] = {}
        """Each of as many pages as a block has room for, the last one used at the end."""
        self.dirty: set[int] = set()
        """Chunks with more than the disk knows, or less."""


@dataclass(slots=True, eq=False)
class Ocfs2Inode(Inode):
    """An OCFS2 inode in memory; current only while its meta lock is in use."""

    flags: int = 0
    clusters: int = 0
    suballoc_slot: int = 0
    suballoc_bit: int = 0
    orphaned_slot: int = 0
    dyn_features: int = 0
    attribute_block: int = 0
    """0: it has no attributes."""
    serial: int = 0
    """Which refresh of the lock the fields come from; 0: none yet."""
    gone: bool = False
    """The file that this object stood for was freed, here or by another node."""
    names: dict[bytes, int] = field(default_factory=dict)
    """Of a directory: names found before."""
    room_block: int = 0
    """Of a directory: blocks before this one had no room when last looked at."""
    checksums: FileChecksums | None = None
    """Of a file, once they were looked for (`fs.ocfs2.checksums`)."""

    @property
    def is_system(self) -> bool:
        """One of the file system's own files."""
        return bool(self.flags & InodeFlag.SYSTEM)

    @property
    def is_fast_symlink(self) -> bool:
        """True when the link's text is in the inode's block."""
        return self.is_symlink and not self.clusters

    def snapshot(self) -> tuple[object, ...]:
        """All that an operation may change."""
        return (
            self.mode, self.nlink, self.uid, self.gid, self.size, self.sectors, self.atime_ns,
            self.mtime_ns, self.ctime_ns, self.flags, self.clusters, self.orphaned_slot,
            self.dyn_features, self.attribute_block, self.room_block, self.gone,
        )  # fmt: skip

    def restore(self, snapshot: tuple[object, ...]) -> None:
        """Put it back."""
        (
            self.mode, self.nlink, self.uid, self.gid, self.size, self.sectors, self.atime_ns,
            self.mtime_ns, self.ctime_ns, self.flags, self.clusters, self.orphaned_slot,
            self.dyn_features, self.attribute_block, self.room_block, self.gone,
        ) = snapshot  # type: ignore[assignment]  # fmt: skip
        self.names.clear()


def own(inode: Inode) -> Ocfs2Inode:
    """An inode of this file system."""
    assert isinstance(inode, Ocfs2Inode), "an inode is used with the file system it came from"
    return inode


def blank(block: int) -> Ocfs2Inode:
    """An object for the inode in `block`, not read yet."""
    return Ocfs2Inode(block, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Dinodes:
    """Reads and writes inodes through the transactions.

    `load` of an object whose file was freed meanwhile (by another node) is ESTALE.
    """

    def __init__(self, transactions: Transactions, fs_generation: int, blocks: int) -> None:
        self._transactions = transactions
        self.fs_generation = fs_generation
        self._blocks = blocks
        self.keep_checksums = False
        """This mount keeps checksums of pages: they stay valid when an inode's times change."""
        self.features = DynFeature(0)
        """That inodes of this volume may have."""

    def buffer(self, inode: Ocfs2Inode) -> Buffer:
        """The block of an inode."""
        return self._transactions.get(inode.ino, inode.ino)

    def load(self, inode: Ocfs2Inode) -> None:
        """Take the fields from the block; EUCLEAN when it is no inode in use."""
        raw = Dinode.read(self.buffer(inode).data)
        if inode.serial and (inode.generation != raw.generation or not raw.flags & InodeFlag.VALID):
            inode.gone = True
            raise error(errno.ESTALE, f"inode {inode.ino} was freed")
        self._check(raw, inode.ino)
        inode.generation = raw.generation
        inode.mode = raw.mode
        inode.nlink = raw.nlink
        inode.uid = raw.uid
        inode.gid = raw.gid
        inode.size = raw.size
        inode.clusters = raw.clusters
        inode.sectors = raw.clusters * CLUSTER_SECTORS
        inode.atime_ns = raw.atime_s * _NS + raw.atime_nsec
        inode.mtime_ns = raw.mtime_s * _NS + raw.mtime_nsec
        inode.ctime_ns = raw.ctime_s * _NS + raw.ctime_nsec
        inode.flags = raw.flags
        inode.suballoc_slot = raw.suballoc_slot
        inode.suballoc_bit = raw.suballoc_bit
        inode.orphaned_slot = raw.orphaned_slot
        inode.dyn_features = raw.dyn_features
        inode.attribute_block = raw.xattr_block
        inode.names.clear()
        inode.room_block = 0
        inode.checksums = None

    def _check(self, raw: Dinode, block: int) -> None:
        wrong = ""
        kind = stat.S_IFMT(raw.mode)
        if raw.signature != DINODE_SIGNATURE:
            wrong = "has no inode's signature"
        elif raw.block != block:
            wrong = f"says that it is inode {raw.block}"
        elif raw.fs_generation != self.fs_generation:
            wrong = "belongs to another volume"
        elif not raw.flags & InodeFlag.VALID:
            wrong = "is not in use"
        elif kind not in FILE_TYPES:
            wrong = f"has the unknown mode {raw.mode:#o}"
        elif raw.dyn_features & ~self.features:
            wrong = f"uses {DynFeature(raw.dyn_features)!r}, which the volume doesn't have"
        elif raw.refcount_block or bool(raw.dyn_features & DynFeature.HAS_XATTR) != bool(
            raw.xattr_block
        ):
            wrong = "has attributes or shared clusters, which the volume doesn't have"
        elif max(raw.atime_nsec, raw.mtime_nsec, raw.ctime_nsec) >= _NS:
            wrong = "has a time with too many nanoseconds"
        elif raw.flags & (InodeFlag.BITMAP | InodeFlag.DEALLOC | InodeFlag.SUPER_BLOCK):
            pass  # sizes of allocators are checked where they are used
        elif raw.clusters > self._blocks:
            wrong = f"has {raw.clusters} clusters on a disk of {self._blocks}"
        elif kind == stat.S_IFDIR and (
            not raw.size or raw.size % BLOCK_BYTES or raw.size > raw.clusters * BLOCK_BYTES
        ):
            wrong = f"is a directory of {raw.size} bytes in {raw.clusters} clusters"
        elif kind == stat.S_IFREG and raw.size > raw.clusters * BLOCK_BYTES:
            wrong = f"is a file of {raw.size} bytes in {raw.clusters} clusters"
        elif kind == stat.S_IFLNK and not 0 < raw.size < (
            BLOCK_BYTES if raw.clusters else FAST_SYMLINK_BYTES_MAX + 1
        ):
            wrong = f"is a symbolic link of {raw.size} bytes"
        if wrong:
            raise corrupt(f"inode {block} {wrong}")

    def store(self, inode: Ocfs2Inode) -> None:
        """Put the fields into the block, inside an operation."""
        buffer = self.buffer(inode)
        self._transactions.modify(buffer)
        raw = Dinode.read(buffer.data)
        raw.mode = inode.mode
        raw.nlink = inode.nlink
        raw.uid = inode.uid
        raw.gid = inode.gid
        raw.size = inode.size
        raw.clusters = inode.clusters
        raw.atime_s, raw.atime_nsec = divmod(max(0, inode.atime_ns), _NS)
        raw.mtime_s, raw.mtime_nsec = divmod(max(0, inode.mtime_ns), _NS)
        raw.ctime_s, raw.ctime_nsec = divmod(max(0, inode.ctime_ns), _NS)
        raw.flags = inode.flags
        raw.orphaned_slot = inode.orphaned_slot
        raw.dyn_features = inode.dyn_features
        raw.xattr_block = inode.attribute_block
        if self.keep_checksums and inode.is_file:
            checksumarea.follow(buffer.data, Dinode.read(buffer.data), raw)
        raw.write_into(buffer.data)

    def set_clusters(self, inode: Ocfs2Inode, clusters: int) -> None:
        """The inode has this many clusters now; `store` follows."""
        inode.clusters = clusters
        inode.sectors = clusters * CLUSTER_SECTORS

    def make(
        self,
        block: int,
        slot: int,
        bit: int,
        mode: int,
        nlink: int,
        now_ns: int,
        *,
        extents: bool,
    ) -> Ocfs2Inode:
        """A new inode in a block that was just allocated; `extents`: with an empty list of them."""
        self._transactions.cache.drop(block)  # another node may have used the number meanwhile
        before = Dinode.read(self._transactions.get(block, block).data)
        # The file that had this number before had another generation: pages are told apart by it.
        known = before.signature == DINODE_SIGNATURE and before.block == block
        generation = (before.generation + 1 if known else now_ns // _NS) & 0xFFFFFFFF
        seconds, nsec = divmod(now_ns, _NS)
        buffer = self._transactions.create(block, block)
        Dinode(
            generation=generation, suballoc_slot=slot, suballoc_bit=bit, mode=mode, nlink=nlink,
            flags=int(InodeFlag.VALID), block=block, fs_generation=self.fs_generation,
            atime_s=seconds, ctime_s=seconds, mtime_s=seconds,
            atime_nsec=nsec, ctime_nsec=nsec, mtime_nsec=nsec,
        ).write_into(buffer.data)  # fmt: skip
        if extents:
            ExtentListHeader().write_into(buffer.data)
        return Ocfs2Inode(
            block, generation, mode, nlink, 0, 0, 0, 0, now_ns, now_ns, now_ns,
            flags=int(InodeFlag.VALID), suballoc_slot=slot, suballoc_bit=bit,
        )  # fmt: skip

    def retire(self, inode: Ocfs2Inode, now_ns: int) -> None:
        """The inode is no more; its block keeps the generation for the next one."""
        buffer = self.buffer(inode)
        self._transactions.modify(buffer)
        raw = Dinode.read(buffer.data)
        raw.flags &= ~int(InodeFlag.VALID | InodeFlag.ORPHANED)
        raw.dtime_s = now_ns // _NS
        raw.write_into(buffer.data)

    def symlink_text(self, inode: Ocfs2Inode) -> bytes:
        """The target of a short symbolic link."""
        return bytes(self.buffer(inode).data[ID2_OFFSET : ID2_OFFSET + inode.size])

    def set_symlink_text(self, inode: Ocfs2Inode, target: bytes) -> None:
        """Store a short target, up to FAST_SYMLINK_BYTES_MAX bytes."""
        buffer = self.buffer(inode)
        self._transactions.modify(buffer)
        buffer.data[ID2_OFFSET : ID2_OFFSET + len(target)] = target
