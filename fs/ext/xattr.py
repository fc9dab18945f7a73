"""Extended attributes: only what freeing a file needs.

mke2fs copies attributes into images (a block named by `i_file_acl`, which files may share, or the
room behind the inode). We neither show nor change them; a file that goes away gives up its share
of the block. The block starts with magic 0xEA020000 and a count of the inodes that use it.
"""

from __future__ import annotations

import struct
from typing import Final

from fs.buffers import Buffers
from fs.ext.allocator import Allocator
from fs.ext.group import Groups
from fs.ext.inode import BLOCK_SECTORS, ExtInode
from fs.ext.super import Superblock

MAGIC: Final = 0xEA020000


def release(
    inode: ExtInode, buffers: Buffers, superblock: Superblock, groups: Groups, allocator: Allocator
) -> None:
    """Drop the share of `inode` in its attribute block, and the block with the last share."""
    block = inode.file_acl
    if not block:
        return
    if groups.holds_metadata(block, 1):
        raise superblock.damage(f"inode {inode.ino} has its attributes in block {block}")
    buffer = buffers.get(block)
    magic, users = struct.unpack_from("<II", buffer.data)
    if magic != MAGIC or not users:
        raise superblock.damage(f"block {block} of inode {inode.ino} holds no attributes")
    inode.file_acl = 0
    inode.sectors = max(0, inode.sectors - BLOCK_SECTORS)
    if users == 1:
        allocator.free_run(block, 1)
    else:
        struct.pack_into("<I", buffer.data, 4, users - 1)
        buffers.dirty(buffer)
