"""What a survivor does with the slot of a dead node.

    1. replay the slot's journal, under the super lock
    2. take what the slot's local alloc and truncate log hold, and give the slot free
    3. free the inodes in its orphan directory

The order is Linux's. Step 1 must come before anyone else gets a lock that the dead node held in
EX; the lock manager sees to that (see `fs.dlm`). Each step may be cut off and done again: a
journal that is replayed twice is replayed once, the empty local alloc and truncate log and the
freed clusters are one operation, and so is the end of each orphan.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final

from fs import bitmap
from fs.dlm.modes import Mode
from fs.errors import corrupt
from fs.ocfs2.files import Files
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.format import (
    GROUP_BITS_MAX,
    ID2_OFFSET,
    LOCAL_ALLOC_BITMAP_OFFSET,
    LOCAL_ALLOC_BYTES,
    SUPER_BLOCK,
    TRUNCATE_LOG_RECORDS,
    TRUNCATE_RECORD,
    Dinode,
    LocalAlloc,
    TruncateLogHeader,
)
from fs.ocfs2.inodelocks import Rank
from fs.ocfs2.journals import SlotJournal
from fs.ocfs2.locking import SUPER, lock_name
from fs.ocfs2.names import Names
from fs.ocfs2.slots import SlotMap
from fs.ocfs2.volume import Volume

SUPER_LOCK: Final = lock_name(SUPER, SUPER_BLOCK)


def slot_journal(volume: Volume, slot: int) -> SlotJournal:
    """The journal of a slot."""
    name = b"journal:%04d" % slot
    return SlotJournal(volume.device, volume.system[name], volume.system_blocks(name))


def slot_map(volume: Volume) -> SlotMap:
    """The slot map."""
    return SlotMap(volume.device, volume.system_blocks(b"slot_map"), volume.super.slots)


def take_slot(volume: Volume, slot: int) -> int:
    """Steps 1 and 2 for the slot of a dead node, under the super lock; returns the blocks that
    were replayed."""
    replayed = replay(volume, slot)
    release_leftovers(volume, slot)
    volume.transactions.commit()
    slot_map(volume).set(slot, None)
    return replayed


def replay(volume: Volume, slot: int) -> int:
    """Replay the slot's journal if it is dirty, and say so in its inode."""
    journal = slot_journal(volume, slot)
    if not journal.dirty:
        return 0
    replayed = journal.replay().replayed_blocks
    volume.device.flush()
    journal.mark_clean(recovered=True)
    # Before this mount has a journal of its own nothing was changed here, and what was read came
    # from before the replay, whoever held which lock. Later it holds no lock that the dead had.
    volume.locks.doubt_all(also_held=not volume.has_journal)
    return replayed


def release_leftovers(volume: Volume, slot: int) -> None:
    """Give clusters in the slot's local alloc and truncate log back to the global bitmap."""
    local = volume.system[b"local_alloc:%04d" % slot]
    log = volume.system[b"truncate_log:%04d" % slot]

    def body() -> None:
        for first, count in [*_take_local_alloc(volume, slot), *_take_truncate_log(volume, slot)]:
            volume.space.free_clusters(first, count)

    with volume.locked(local, Mode.PR), volume.locked(log, Mode.PR):
        raw = Dinode.read(volume.dinodes.buffer(local).data)
        header = TruncateLogHeader.read(volume.dinodes.buffer(log).data)
        left = raw.id1_high or header.used
    if left:
        volume.run([], body)


def _take_local_alloc(volume: Volume, slot: int) -> list[tuple[int, int]]:
    inode = volume.system[b"local_alloc:%04d" % slot]
    volume.locks.need(Rank.SLOT_FILE, inode, slot * 2)
    buffer = volume.dinodes.buffer(inode)
    raw = Dinode.read(buffer.data)
    window = LocalAlloc.read(buffer.data)
    if not raw.id1_high:
        return []
    if (
        not raw.flags & InodeFlag.LOCAL_ALLOC
        or raw.id1_high > LOCAL_ALLOC_BYTES * 8
        or window.bitmap_bytes > LOCAL_ALLOC_BYTES
        or window.first_cluster + raw.id1_high > volume.super.blocks
    ):
        raise corrupt(f"the local alloc of slot {slot} makes no sense")
    bits = buffer.data[LOCAL_ALLOC_BITMAP_OFFSET:]
    free: list[tuple[int, int]] = []
    bit = bitmap.find_clear(bits, 0, raw.id1_high)
    while bit is not None:
        length = bitmap.clear_run(bits, bit, raw.id1_high)
        free.append((window.first_cluster + bit, length))
        bit = bitmap.find_clear(bits, bit + length, raw.id1_high)
    volume.transactions.modify(buffer)
    raw.id1_low = raw.id1_high = 0
    raw.write_into(buffer.data)
    LocalAlloc(bitmap_bytes=window.bitmap_bytes).write_into(buffer.data)
    buffer.data[LOCAL_ALLOC_BITMAP_OFFSET:] = bytes(LOCAL_ALLOC_BYTES)
    return free


def _take_truncate_log(volume: Volume, slot: int) -> list[tuple[int, int]]:
    inode = volume.system[b"truncate_log:%04d" % slot]
    volume.locks.need(Rank.SLOT_FILE, inode, slot * 2 + 1)
    buffer = volume.dinodes.buffer(inode)
    header = TruncateLogHeader.read(buffer.data)
    if header.used > header.count or header.count > TRUNCATE_LOG_RECORDS:
        raise corrupt(f"the truncate log of slot {slot} has {header.used} records")
    records: list[tuple[int, int]] = []
    for number in range(header.used):
        first, count = TRUNCATE_RECORD.unpack_from(
            buffer.data, ID2_OFFSET + TruncateLogHeader.STRUCT.size + number * TRUNCATE_RECORD.size
        )
        # Linux leaves records of cluster 0 behind: they are void.
        if not first or not count:
            continue
        if first + count > volume.super.blocks or count > GROUP_BITS_MAX:
            raise corrupt(f"the truncate log of slot {slot} names clusters from {first} on")
        records.append((first, count))
    volume.transactions.modify(buffer)
    TruncateLogHeader(count=header.count).write_into(buffer.data)
    start = ID2_OFFSET + TruncateLogHeader.STRUCT.size
    buffer.data[start:] = bytes(len(buffer.data) - start)
    return records


def free_orphans(volume: Volume, files: Files, names: Names, slot: int) -> int:
    """Free the inodes in a slot's orphan directory that nobody holds open; returns how many."""
    return sum(freeing_orphans(volume, files, names, slot))


def freeing_orphans(volume: Volume, files: Files, names: Names, slot: int) -> Iterator[bool]:
    """The same one by one, no lock being in use between them; whether each was freed."""
    with volume.locked(volume.orphans.directory(slot), Mode.PR):
        numbers = volume.orphans.numbers(slot)
    for ino in numbers:
        try:
            inode = names.iget(ino)
            freed = inode.nlink == 0 and files.free_orphan(inode)
        except OSError as reason:
            # Freed by another node meanwhile, or damaged: that one stays for the checker to see.
            if reason.errno not in (errno.ESTALE, errno.EUCLEAN):
                raise
            freed = False
        yield freed
