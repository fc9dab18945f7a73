"""`check`: all passes over a volume, which it never changes.

    journals      which of them have something to replay; the rest is of the volume after that
    pass 0        chain allocators, group descriptors
    pass 1        inodes, extent trees, local allocs, truncate logs; who owns which cluster
    pass 2 to 4   directories, what is connected, orphans, names
    last          the global bitmap against the owners

Differs from fsck.ocfs2: it repairs nothing, takes the minimal profile only, and sees a volume
with dirty journals as if they were replayed. Memory: a bit for each cluster (twice), and what a
few words for each inode and each directory's extents take; problems are cut at a thousand.
"""

from __future__ import annotations

from collections.abc import Iterable

from fs.block.device import BlockDevice
from fs.errors import ImageError
from fs.ocfs2.format import (
    DINODE_SIGNATURE,
    FIRST_GROUP_BLOCK,
    INVALID_SLOT,
    STATE_ERRORS,
    SUPER_BLOCK,
    SuperBlock,
)
from fs.ocfs2.fsck import system
from fs.ocfs2.fsck.directories import Directories
from fs.ocfs2.fsck.groups import Allocators
from fs.ocfs2.fsck.inodes import Inodes
from fs.ocfs2.fsck.marks import runs
from fs.ocfs2.fsck.problems import Findings, Problem
from fs.ocfs2.fsck.volume import CheckedVolume, Group
from fs.ocfs2.journals import ReplayedDevice
from fs.ocfs2.super import Superblock, is_ocfs2


def check(device: BlockDevice) -> list[Problem]:
    """What is wrong with the volume on `device`; an empty list when nothing is.

    `ImageError` when it holds no OCFS2 volume, or one with features that are not supported here.
    """
    found = Findings()
    try:
        if not is_ocfs2(device):
            raise ImageError("holds no OCFS2 volume")
        superblock = Superblock(device)
    except OSError as reason:
        found.add("READ_ERROR", "superblock", f"it can't be read: {reason}.")
        return found.all()
    except ImageError as reason:
        if "makes no sense" not in str(reason) and "was cut off" not in str(reason):
            raise
        found.add("SUPERBLOCK", "superblock", f"the volume {reason}.")
        return found.all()
    volume = CheckedVolume(device, superblock, found)
    _check_superblock(volume)
    system.find_system_files(volume)
    images = system.check_journals(volume)
    if images:
        volume.device = ReplayedDevice(device, images)
    system.check_slot_map(volume)
    bitmap = _check_contents(volume)
    if bitmap:
        _check_bitmap(volume, bitmap)
    return found.all()


def _check_superblock(volume: CheckedVolume) -> None:
    data, raw = volume.dinode(SUPER_BLOCK)
    superblock = SuperBlock.read(data)
    add = volume.found.add
    if raw.generation != raw.fs_generation:
        add("INODE_GEN", "superblock", f"its generation is {raw.generation:#x}.")
    if volume.super.first_group != FIRST_GROUP_BLOCK:
        add("SUPERBLOCK", "superblock", f"its first group is {volume.super.first_group}.")
    if superblock.state & STATE_ERRORS:
        add("SUPERBLOCK", "superblock", "somebody saw damage on this volume.")
    root = volume.dinode(volume.super.root_block)[1]
    if root.signature != DINODE_SIGNATURE:
        add("ROOT_DIR_MISSING", "root directory", "it is no inode.")
    elif root.mode & 0o170000 != 0o040000:
        add("ROOT_NOTDIR", "root directory", "it is no directory.")


def _check_contents(volume: CheckedVolume) -> list[Group]:
    """Passes 0 to 4; the groups of the global bitmap."""
    allocators = Allocators(volume)
    slots = range(volume.super.slots)
    bitmap: list[Group] = []
    if (ino := volume.system.get(b"global_bitmap")) is not None:
        bitmap = allocators.check(ino, "global_bitmap", is_global=True)
    inode_groups: list[tuple[int, Group]] = []
    extent_groups: list[tuple[int, Group]] = []
    for slot, name, groups in [
        (INVALID_SLOT, b"global_inode_alloc", inode_groups),
        *((slot, b"inode_alloc:%04d" % slot, inode_groups) for slot in slots),
        *((slot, b"extent_alloc:%04d" % slot, extent_groups) for slot in slots),
    ]:
        if (ino := volume.system.get(name)) is not None:
            checked = allocators.check(ino, name.decode(), is_global=False)
            groups += [(slot, group) for group in checked]
    inodes = Inodes(volume)
    for slot, group in inode_groups:
        inodes.check_group(group, slot)
    for directory in (volume.super.root_block, volume.super.system_dir_block):
        if directory not in volume.files:
            volume.found.add("ROOT_DIR_MISSING", f"inode {directory}", "no allocator has it.")
    system.check_local_allocs(volume)
    system.check_truncate_logs(volume)
    _check_extent_blocks(volume, extent_groups)
    orphan_dirs = {
        volume.system[name]: name.decode()
        for name in (b"orphan_dir:%04d" % slot for slot in slots)
        if name in volume.system
    }
    Directories(volume, orphan_dirs).check()
    _check_lost_found(volume)
    return bitmap


def _check_lost_found(volume: CheckedVolume) -> None:
    names = (name for name, _ino in system.entries(volume, volume.super.root_block))
    if b"lost+found" not in names:
        volume.found.add("LOSTFOUND_MISSING", "root directory", "it has no lost+found.")


def _check_extent_blocks(volume: CheckedVolume, groups: Iterable[tuple[int, Group]]) -> None:
    """Bits of the extent allocators against the trees."""
    allocated: dict[int, tuple[int, int]] = {}
    for slot, group in groups:
        for start, count in runs(group.bitmap):
            for bit in range(max(start, 1), start + count):
                allocated[group.block + bit] = slot, bit
    for block, said in volume.extent_blocks.items():
        place = f"extent block {block}"
        right = allocated.pop(block, None)
        if right is None:
            volume.found.add("EB_ALLOC", place, "its allocator says that it is free.")
        elif said != right:
            volume.found.add(
                "EB_ALLOC", place, f"it says slot and bit {said}, its allocator {right}."
            )
    for block in allocated:
        volume.found.add("EB_ALLOC", f"extent block {block}", "it is in use, but in no tree.")


def _check_bitmap(volume: CheckedVolume, groups: Iterable[Group]) -> None:
    for group in groups:
        first = 0 if group.block == FIRST_GROUP_BLOCK else group.block
        if first % 8:
            continue  # It was reported as a group that doesn't belong there.
        owned = volume.owned.window(first, group.bits)
        reserved = volume.reserved.window(first, group.bits)
        for bits, text in (
            (owned & ~group.bitmap, "are in use, but free in the global bitmap."),
            (group.bitmap & ~owned & ~reserved, "are taken in the global bitmap, but unused."),
        ):
            for start, count in runs(bits):
                low, high = first + start, first + start + count - 1
                volume.found.add("CLUSTER_ALLOC_BIT", f"clusters {low} to {high}", f"they {text}")
