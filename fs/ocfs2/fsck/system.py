"""The files of the system directory: found by name, then each by what it is for."""

from __future__ import annotations

import stat
from collections.abc import Iterator

from fs.block.device import BLOCK_BYTES
from fs.errors import ImageError
from fs.jbd2.area import Area
from fs.jbd2.recovery import recover, unreplayed
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.format import (
    DINODE_EXTENTS,
    DINODE_SIGNATURE,
    DIR_ENTRY,
    GLOBAL_SYSTEM_FILES,
    GROUP_BITS_MAX,
    ID2_OFFSET,
    JOURNAL_BYTES_MIN,
    JOURNAL_DIRTY,
    LOCAL_ALLOC_BITMAP_OFFSET,
    LOCAL_ALLOC_BYTES,
    SLOT_ENTRY,
    SLOT_SYSTEM_FILES,
    TRUNCATE_LOG_RECORDS,
    TRUNCATE_RECORD,
    Dinode,
    ExtentListHeader,
    LocalAlloc,
    TruncateLogHeader,
    read_extent,
)
from fs.ocfs2.fsck.volume import CheckedVolume
from fs.ocfs2.slots import NODES_MAX

_CODES = {b"orphan_dir": "ORPHAN_DIR_MISSING", b"journal": "JOURNAL_FILE_INVALID"}


_SMALL_BLOCKS = 1 << 18
"""1 GiB: four times the largest journal."""


def flat_blocks(volume: CheckedVolume, ino: int) -> list[int]:
    """Blocks of a small file, without checks: what lies outside of the volume is left out."""
    data, raw = volume.dinode(ino)
    head = ExtentListHeader.read(data)
    if raw.signature != DINODE_SIGNATURE or head.depth:
        return []
    blocks: list[int] = []
    for index in range(min(head.used, DINODE_EXTENTS)):
        record = read_extent(data, ID2_OFFSET, index, leaf=True)
        end = min(record.block + record.clusters, volume.blocks)
        blocks += range(min(record.block, end), end)
        if len(blocks) > _SMALL_BLOCKS:
            return []
    return blocks


def entries(volume: CheckedVolume, ino: int) -> Iterator[tuple[bytes, int]]:
    """Names and inodes in a directory, as far as it can be read."""
    for block in flat_blocks(volume, ino)[: volume.super.slots + 1]:
        data = volume.read(block)
        offset = 0
        while offset + DIR_ENTRY.size <= BLOCK_BYTES:
            target, length, name_bytes, _kind = DIR_ENTRY.unpack_from(data, offset)
            if length < DIR_ENTRY.size or length % 4:
                break
            start = offset + DIR_ENTRY.size
            if target and start + name_bytes <= BLOCK_BYTES:
                yield bytes(data[start : start + name_bytes]), target
            offset += length


def find_system_files(volume: CheckedVolume) -> None:
    """Fill `volume.system`; what is missing is a problem."""
    present = dict(entries(volume, volume.super.system_dir_block))
    wanted = list(GLOBAL_SYSTEM_FILES)
    for pattern, mode, flags in SLOT_SYSTEM_FILES:
        wanted += [(pattern % slot, mode, flags) for slot in range(volume.super.slots)]
    for name, mode, flags in wanted:
        code = _CODES.get(name.split(b":")[0], "SYSTEM_FILE")
        ino = present.get(name)
        shown = name.decode()
        if ino is None:
            volume.found.add(code, shown, "the system directory has no such entry.")
            continue
        if not volume.is_block(ino) or volume.dinode(ino)[1].signature != DINODE_SIGNATURE:
            volume.found.add(code, shown, f"its entry leads to block {ino}, which is no inode.")
            continue
        raw = volume.dinode(ino)[1]
        right = flags | InodeFlag.VALID | InodeFlag.SYSTEM
        if raw.flags != right or stat.S_IFMT(raw.mode) != stat.S_IFMT(mode):
            volume.found.add(
                code,
                shown,
                f"inode {ino} has flags {raw.flags:#x} and mode {raw.mode:#o} instead of"
                f" {int(right):#x} and {mode:#o}.",
            )
            if stat.S_IFMT(raw.mode) != stat.S_IFMT(mode):
                continue
        if ino in volume.system.values():
            volume.found.add(code, shown, f"inode {ino} is another system file already.")
            continue
        volume.system[name] = ino


def check_slot_map(volume: CheckedVolume) -> None:
    """Entries that can be, and slots that nobody gave back."""
    ino = volume.system.get(b"slot_map")
    if ino is None:
        return
    slots = volume.super.slots
    blocks = flat_blocks(volume, ino)
    if not blocks:
        volume.found.add("SLOT_MAP", "slot_map", "it has no block.")
        return
    data = volume.read(blocks[0])
    nodes: dict[int, int] = {}
    for slot, (valid, node) in enumerate(SLOT_ENTRY.iter_unpack(data)):
        place = f"slot_map, slot {slot}"
        if valid and slot >= slots:
            volume.found.add("SLOT_MAP", place, f"it is in use, and there are {slots} slots.")
        elif valid > 1 or (valid and node >= NODES_MAX):
            volume.found.add("SLOT_MAP", place, f"it can't be in use ({valid}) by node {node}.")
        elif valid and node in nodes:
            volume.found.add("SLOT_MAP", place, f"node {node} has slot {nodes[node]} too.")
        elif valid:
            nodes[node] = slot
            volume.found.add(
                "SLOT_IN_USE",
                place,
                f"node {node} has mounted the volume, or was stopped without unmounting it.",
                pending=True,
            )


def check_journals(volume: CheckedVolume) -> dict[int, bytearray]:
    """Each slot's journal; the block images that replaying would write."""
    images: dict[int, bytearray] = {}
    for slot in range(volume.super.slots):
        name = b"journal:%04d" % slot
        ino = volume.system.get(name)
        if ino is None:
            continue
        place = name.decode()
        blocks = flat_blocks(volume, ino)
        if len(blocks) * BLOCK_BYTES < JOURNAL_BYTES_MIN:
            volume.found.add("JOURNAL_TOO_SMALL", place, f"it has {len(blocks)} blocks.")
        try:
            area = Area(volume.device, blocks)
            log = recover(area, read_only=True)
            waiting = unreplayed(area) if log.transactions else {}
        except ImageError as reason:
            volume.found.add("JOURNAL_UNKNOWN_FEATURE", place, f"its log can't be read: {reason}.")
            continue
        except OSError as reason:
            volume.found.add("JOURNAL_FILE_INVALID", place, f"its log can't be read: {reason}.")
            continue
        raw = volume.dinode(ino)[1]
        if raw.id1_low & JOURNAL_DIRTY:
            volume.found.add(
                "JOURNAL_DIRTY",
                place,
                f"{log.transactions} transactions wait to be replayed; the rest of the check is"
                " of the volume as it will be then.",
                pending=True,
            )
            images |= waiting
        elif raw.id1_low:
            volume.found.add("JOURNAL_FILE_INVALID", place, f"its flags are {raw.id1_low:#x}.")
    return images


def check_local_allocs(volume: CheckedVolume) -> None:
    """Windows of the slots: counts, ranges, and what they set aside."""
    for slot in range(volume.super.slots):
        ino = volume.system.get(b"local_alloc:%04d" % slot)
        if ino is not None:
            _check_local_alloc(volume, f"local_alloc:{slot:04d}", *volume.dinode(ino))


def _check_local_alloc(volume: CheckedVolume, place: str, data: bytearray, raw: Dinode) -> None:
    add = volume.found.add
    head = LocalAlloc.read(data)
    total, used = raw.id1_high, raw.id1_low
    if head.bitmap_bytes != LOCAL_ALLOC_BYTES:
        add("LALLOC_SIZE", place, f"its bitmap is said to have {head.bitmap_bytes} bytes.")
    bits = int.from_bytes(data[LOCAL_ALLOC_BITMAP_OFFSET:], "little")
    if total == 0:
        if used:
            add("LALLOC_NZ_USED", place, f"it is empty, but {used} bits are used.")
        if head.first_cluster:
            add("LALLOC_NZ_BM", place, f"it is empty, but begins at {head.first_cluster}.")
        if bits:
            add("LALLOC_CLEAR", place, "it is empty, but bits are set in it.")
        return
    if total > LOCAL_ALLOC_BYTES * 8:
        add("LALLOC_BM_SIZE", place, f"it is said to have {total} bits.")
        return
    end = head.first_cluster + total
    if head.first_cluster < 1 or end > volume.blocks:
        add("LALLOC_BM_OVERRUN", place, f"clusters {head.first_cluster} to {end - 1} can't be.")
        return
    if head.first_cluster // GROUP_BITS_MAX != (end - 1) // GROUP_BITS_MAX:
        add("LALLOC_BM_STRADDLE", place, f"cluster {head.first_cluster} begins two groups.")
    if used > total:
        add("LALLOC_USED_OVERRUN", place, f"{used} of {total} bits are said to be used.")
    window = bits & ((1 << total) - 1)
    if window.bit_count() != used:
        add("LALLOC_USED", place, f"it says {used} bits are used, its bitmap {window.bit_count()}.")
    list(volume.reserved.mark(head.first_cluster, total))
    add("LALLOC_IN_USE", place, f"{total} clusters are set aside for its slot.", pending=True)


def check_truncate_logs(volume: CheckedVolume) -> None:
    """What the slots have freed and not given back yet."""
    for slot in range(volume.super.slots):
        ino = volume.system.get(b"truncate_log:%04d" % slot)
        if ino is None:
            continue
        data, _raw = volume.dinode(ino)
        place = f"truncate_log:{slot:04d}"
        head = TruncateLogHeader.read(data)
        if head.count != TRUNCATE_LOG_RECORDS:
            volume.found.add("DEALLOC_COUNT", place, f"it claims room for {head.count} records.")
        if head.used > TRUNCATE_LOG_RECORDS:
            volume.found.add("DEALLOC_USED", place, f"it claims to use {head.used} records.")
            continue
        for index in range(head.used):
            start, count = TRUNCATE_RECORD.unpack_from(
                data, ID2_OFFSET + TruncateLogHeader.STRUCT.size + index * TRUNCATE_RECORD.size
            )
            if count == 0 or start == 0:
                continue
            if start >= volume.blocks:
                volume.found.add(
                    "TRUNCATE_REC_START_RANGE", place, f"record {index} begins at {start}."
                )
            elif start + count > volume.blocks:
                volume.found.add(
                    "TRUNCATE_REC_RANGE", place, f"record {index} ends at {start + count - 1}."
                )
            else:
                list(volume.reserved.mark(start, count))
        if head.used:
            volume.found.add(
                "TRUNCATE_LOG_IN_USE",
                place,
                f"{head.used} runs of clusters wait to be given back.",
                pending=True,
            )
