"""Flag words of OCFS2: what an inode is, and the features of a volume.

A feature that is not in the minimal profile refuses the mount by its name (`fs.ocfs2.super`), so
every bit that Linux knows has one here.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final


class InodeFlag(IntFlag):
    """`flags` of a dinode."""

    VALID = 0x1
    ORPHANED = 0x4
    SYSTEM = 0x10
    SUPER_BLOCK = 0x20
    LOCAL_ALLOC = 0x40
    BITMAP = 0x80
    JOURNAL = 0x100
    HEARTBEAT = 0x200
    CHAIN = 0x400
    DEALLOC = 0x800


class DynFeature(IntFlag):
    """`dyn_features` of a dinode: none of them is used in the minimal profile."""

    INLINE_DATA = 0x1
    HAS_XATTR = 0x2
    INLINE_XATTR = 0x4
    INDEXED_DIR = 0x8
    HAS_REFCOUNT = 0x10


class Compat(IntFlag):
    """Features that an old writer may ignore."""

    BACKUP_SUPER = 0x1
    STRICT_JOURNAL_SUPER = 0x2


class Incompat(IntFlag):
    """Features without which nothing may be read."""

    HEARTBEAT_DEVICE = 0x2
    RESIZE_IN_PROGRESS = 0x4
    LOCAL_MOUNT = 0x8
    SPARSE_ALLOC = 0x10
    TUNEFS_IN_PROGRESS = 0x20
    INLINE_DATA = 0x40
    USERSPACE_STACK = 0x80
    EXTENDED_SLOT_MAP = 0x100
    XATTR = 0x200
    INDEXED_DIRS = 0x400
    META_ECC = 0x800
    REFCOUNT_TREE = 0x1000
    DISCONTIG_BG = 0x2000
    CLUSTERINFO = 0x4000
    APPEND_DIO = 0x8000


class RoCompat(IntFlag):
    """Features without which nothing may be written."""

    UNWRITTEN = 0x1
    USRQUOTA = 0x2
    GRPQUOTA = 0x4


COMPAT_USED: Final = Compat.STRICT_JOURNAL_SUPER
INCOMPAT_USED: Final = Incompat.EXTENDED_SLOT_MAP
"""The minimal profile: what our mkfs sets."""
