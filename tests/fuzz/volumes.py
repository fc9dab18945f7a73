"""OCFS2 volumes of several shapes, with fields of their metadata changed.

`small`    a few files;
`trees`    extent trees of three levels, as lists with room for few records make them, directories
           of several blocks, links of both kinds, checksums of pages inside and outside of inodes;
`crashed`  the same as a node left it that died: slot taken, journal dirty, files without a name;
`foreign`  as Linux leaves it: clusters set aside, and a truncate log.

Findings are any exception but `ImageError` and `OSError` with a number that the file system may
say, work without end, blocks that are not there, and a write where nothing may be written.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Final
from unittest import mock

from fs.block.device import BLOCK_BYTES
from fs.block.memory import MemoryDevice
from fs.directpages import DirectPages
from fs.errors import ImageError
from fs.jbd2.format import MAGIC_BYTES
from fs.ocfs2 import extents
from fs.ocfs2.checksumarea import TRAILER_OFFSET
from fs.ocfs2.dinode import Ocfs2Inode
from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.format import (
    DINODE_SIGNATURE,
    DIR_ENTRY,
    EXTENT_BLOCK_LIST_OFFSET,
    EXTENT_BLOCK_SIGNATURE,
    EXTENT_LIST_HEADER_BYTES,
    GROUP_BITMAP_OFFSET,
    GROUP_SIGNATURE,
    ID2_OFFSET,
    LOCAL_ALLOC_BITMAP_OFFSET,
    RECORD_BYTES,
    SUPER_SIGNATURE,
    TRUNCATE_RECORD,
    ChainListHeader,
    ChainRecord,
    Dinode,
    ExtentBlock,
    ExtentListHeader,
    GroupDescriptor,
    LocalAlloc,
    SuperBlock,
    TruncateLogHeader,
    chain_offset,
)
from fs.ocfs2.fsck.checker import check
from fs.ocfs2.inodelocks import Rank, Wanted
from fs.ocfs2.mkfs import Parameters, blocks_needed, make_volume
from fs.ocfs2.names import wants_child
from fs.ocfs2.recovery import slot_journal
from fs.vfs import Vfs
from guests.volumeview import volume_status
from tests.fuzz.fields import Field, GuardedDevice, Image, change, fields_of, image_of
from tests.fuzz.journals import log_fields
from tests.fuzz.reading import Reader, hold
from tests.support.damage import attempt, used_hard

_NOW_NS: Final = 1_767_225_600_000_000_000
_UUID: Final = bytes(range(16))
_ROOM_BLOCKS: Final = 1200
_LARGE_PAGES: Final = 600
_WORK_BLOCKS_MAX: Final = 60_000
"""Blocks read and written of an input; a sound volume needs a tenth of it."""
_RECORDS_SHOWN: Final = 4
_ENTRIES_SHOWN: Final = 6
_LIST_ROOM: Final = 3
"""Records in an extent list of the volume with deep trees."""
_DATA: Final = (b"f", b"x")
_KNOWN: Final = ("/one", "/two", "/d/f", "/moved", "/hard", "/link", "/long", "/big", "/d", "/a")
_MORE_PATHS: Final = 4
_EMPTY_FILES_SHOWN: Final = 3
_ATTRIBUTES_SIGNATURE: Final = b"XATTR01\0"


def _clock() -> int:
    return _NOW_NS


# --- fields


def _extent_list(content: bytes, at: int) -> list[Field]:
    head = ExtentListHeader.read(content, at)
    first = at + EXTENT_LIST_HEADER_BYTES
    shown = min(head.used, _RECORDS_SHOWN)
    found = fields_of(ExtentListHeader.STRUCT, at)
    for number in range(shown + 1):
        # The length of a leaf's record has its flags in the last byte.
        found += fields_of("<IHBBQ", first + number * RECORD_BYTES)
    # Records matter more than the words of an inode that nobody looks at.
    return found * 2


def _dinode(content: bytes) -> list[Field]:
    raw = Dinode.read(content)
    found = fields_of(Dinode.STRUCT)
    if raw.signature == SUPER_SIGNATURE:
        return found + fields_of(SuperBlock.STRUCT, ID2_OFFSET)
    if raw.flags & InodeFlag.CHAIN:
        found += fields_of(ChainListHeader.STRUCT, ID2_OFFSET)
        for number in range(_RECORDS_SHOWN):
            found += fields_of(ChainRecord.STRUCT, chain_offset(number))
        return found
    if raw.flags & InodeFlag.LOCAL_ALLOC:
        return [
            *found,
            *fields_of(LocalAlloc.STRUCT, ID2_OFFSET),
            *fields_of("<4I", LOCAL_ALLOC_BITMAP_OFFSET),
        ]
    if raw.flags & InodeFlag.DEALLOC:
        at = ID2_OFFSET + TruncateLogHeader.STRUCT.size
        found += fields_of(TruncateLogHeader.STRUCT, ID2_OFFSET)
        for number in range(_RECORDS_SHOWN):
            found += fields_of(TRUNCATE_RECORD, at + number * TRUNCATE_RECORD.size)
        return found
    found += _extent_list(content, ID2_OFFSET)
    if any(content[TRAILER_OFFSET:]):
        found += fields_of("<8s16sIIQQQQ", TRAILER_OFFSET)
        found += fields_of("<2Q", TRAILER_OFFSET - 16)
    return found


def _directory(content: bytes) -> list[Field]:
    found: list[Field] = []
    at = 0
    for _ in range(_ENTRIES_SHOWN):
        if at + DIR_ENTRY.size > BLOCK_BYTES:
            break
        _target, length, name_bytes, kind = DIR_ENTRY.unpack_from(content, at)
        if length < DIR_ENTRY.size or length % 4 or kind > 7 or name_bytes > length:
            return []
        found += [*fields_of(DIR_ENTRY, at), Field(at + DIR_ENTRY.size, 1)]
        at += length
    return found


def metadata_fields(content: bytes) -> list[Field]:
    """The fields of a block of an OCFS2 volume; words, where nobody knows what it is."""
    signature = content[:8]
    if signature in (DINODE_SIGNATURE, SUPER_SIGNATURE):
        return _dinode(content)
    if signature == EXTENT_BLOCK_SIGNATURE:
        return fields_of(ExtentBlock.STRUCT) + _extent_list(content, EXTENT_BLOCK_LIST_OFFSET)
    if signature == GROUP_SIGNATURE:
        return fields_of(GroupDescriptor.STRUCT) + fields_of("<8Q", GROUP_BITMAP_OFFSET)
    if signature[:4] == MAGIC_BYTES:
        return log_fields(content, 8)
    if signature == _ATTRIBUTES_SIGNATURE:
        return fields_of("<48I") + fields_of("<32I", BLOCK_BYTES - 128)
    return _directory(content) or fields_of("<16I")


# --- shapes


def _image(device: MemoryDevice) -> Image:
    """With the blocks of a log only where it will be replayed, few of the many that are alike, and
    those more than once that hold trees or entries."""
    ignored = {bytes(BLOCK_BYTES), *(letter * BLOCK_BYTES for letter in _DATA)}
    logs: set[int] = set()
    with contextlib.closing(GuardedDevice(device.contents, blocks_max=_WORK_BLOCKS_MAX)) as copy:
        copy.read_only = True
        volume = Ocfs2(copy, clock_ns=_clock, read_only=True)._volume
        for slot in range(volume.super.slots):
            blocks = slot_journal(volume, slot)
            if not blocks.dirty:
                logs.update(blocks.area.blocks[1:])
    described = []
    empty_files = 0
    for number, content in enumerate(device.contents):
        if content in ignored or number in logs:
            continue
        signature = content[:8]
        raw = Dinode.read(content)
        if signature == DINODE_SIGNATURE and not raw.size and raw.nlink == 1:
            empty_files += 1
            if empty_files > _EMPTY_FILES_SHOWN:
                continue
        weight = 1
        if signature in (EXTENT_BLOCK_SIGNATURE, _ATTRIBUTES_SIGNATURE):
            weight = 4
        elif signature == DINODE_SIGNATURE and not raw.flags & InodeFlag.SYSTEM:
            weight = 3
        elif signature not in (DINODE_SIGNATURE, SUPER_SIGNATURE) and _directory(content):
            weight = 2
        described += [(number, metadata_fields(content))] * weight
    return image_of(device, described)


def _mounted(device: MemoryDevice, *, keep_checksums: bool = False) -> Vfs:
    fs = Ocfs2(
        device, clock_ns=_clock, keep_checksums=keep_checksums, random_bytes=lambda n: b"r" * n
    )
    return Vfs(fs, DirectPages(fs, fs.checksums))


def _blank(slots: int, *, attributes: bool = False) -> MemoryDevice:
    parameters = Parameters(
        slots=slots, uuid=_UUID, generation=7, now_s=_NOW_NS // 10**9, attributes=attributes
    )
    device = MemoryDevice.empty(blocks_needed(parameters) + _ROOM_BLOCKS)
    make_volume(device, parameters, fresh=True)
    return device


def _write(vfs: Vfs, path: str, data: bytes) -> None:
    handle = vfs.open(path, os.O_RDWR | os.O_CREAT)
    vfs.write(handle, data)
    vfs.close(handle)


@functools.cache
def _small() -> Image:
    device = _blank(2)
    vfs = _mounted(device)
    vfs.mkdir("/d")
    vfs.symlink("/d/f", "/link")
    _write(vfs, "/a", b"fff")
    _write(vfs, "/d/f", b"f" * 14 * BLOCK_BYTES)
    vfs.unmount()
    return _image(device)


def _with_trees(device: MemoryDevice) -> Vfs:
    """A file system with everything in it, still mounted."""
    vfs = _mounted(device, keep_checksums=True)
    fs: Ocfs2 = vfs.fs  # type: ignore[assignment]
    volume = fs._volume
    vfs.mkdir("/d")
    vfs.mkdir("/d/inner")
    _write(vfs, "/d/f", b"f" * 3 * BLOCK_BYTES)
    for number in range(40):
        _write(vfs, f"/d/{number:0200}", b"x" if number < 2 else b"")
    vfs.symlink("d/f", "/link")
    vfs.symlink("l" * 4000, "/long")
    vfs.link("/d/f", "/hard")
    # More checksums than an inode's block has room for.
    _write(vfs, "/big", b"f" * _LARGE_PAGES * BLOCK_BYTES)
    files = [fs.create(fs.root, name, 0o644) for name in (b"one", b"two")]
    for file in files:
        vfs.fs.allocate_blocks(file, 0, 1)

        def narrow(file: Ocfs2Inode = file) -> None:
            buffer = volume.dinodes.buffer(file)
            volume.transactions.modify(buffer)
            head = ExtentListHeader.read(buffer.data)
            head.count = _LIST_ROOM - 1
            head.write_into(buffer.data)

        volume.run([wants_child(file)], narrow)
    # In turns, so that each cluster is an extent of its own.
    with mock.patch.object(extents, "BLOCK_EXTENTS", _LIST_ROOM):
        for index in range(1, 14):
            for file in files:
                fs.allocate_blocks(file, index, 1)
    for file in files:
        file.size = file.clusters * BLOCK_BYTES
        fs.write_inode(file)
    return vfs


@functools.cache
def _trees() -> Image:
    device = _blank(2, attributes=True)
    vfs = _with_trees(device)
    vfs.unmount()
    return _image(device)


@functools.cache
def _crashed() -> Image:
    device = _blank(3, attributes=True)
    vfs = _with_trees(device)
    vfs.sync()
    # Open, and so without a name but not gone when the power fails.
    for path in ("/two", f"/d/{1:0200}"):
        vfs.open(path)
        vfs.unlink(path)
    vfs.rename("/d/inner", "/moved")
    vfs.truncate("/one", 6 * BLOCK_BYTES)
    vfs.fs.sync()
    left = device.copy()
    vfs.unmount()
    return _image(left)


@functools.cache
def _foreign() -> Image:
    device = _blank(2)
    vfs = _mounted(device)
    fs: Ocfs2 = vfs.fs  # type: ignore[assignment]
    volume = fs._volume
    _write(vfs, "/d", b"f" * 8 * BLOCK_BYTES)
    file = fs.lookup(fs.root, b"d")
    local, log = volume.system[b"local_alloc:0000"], volume.system[b"truncate_log:0000"]

    def leave() -> None:
        volume.touch(file)
        window = volume.space.clusters.allocate(32)
        buffer = volume.dinodes.buffer(local)
        volume.transactions.modify(buffer)
        raw = Dinode.read(buffer.data)
        raw.id1_low, raw.id1_high = 2, window.length
        raw.write_into(buffer.data)
        LocalAlloc(first_cluster=window.block).write_into(buffer.data)
        buffer.data[LOCAL_ALLOC_BITMAP_OFFSET] = 0b101
        runs = volume.extents.truncate(file, 3, volume.space, 100)
        file.size = file.clusters * BLOCK_BYTES
        volume.dinodes.store(file)
        buffer = volume.dinodes.buffer(log)
        volume.transactions.modify(buffer)
        TruncateLogHeader(used=len(runs) + 1).write_into(buffer.data)
        for number, run in enumerate([*runs, (0, 0)]):
            at = ID2_OFFSET + TruncateLogHeader.STRUCT.size + number * TRUNCATE_RECORD.size
            TRUNCATE_RECORD.pack_into(buffer.data, at, *run)

    wants = [
        wants_child(file),
        Wanted(Rank.SLOT_FILE, 0, local),
        Wanted(Rank.SLOT_FILE, 1, log),
        volume.space.wants_clusters,
    ]
    volume.run(wants, leave)
    volume.transactions.commit()
    volume.transactions.checkpoint()
    left = device.copy()
    vfs.unmount()
    return _image(left)


_SHAPES: Final[tuple[Callable[[], Image], ...]] = (_small, _trees, _crashed, _foreign)


# --- the target


def fuzz_ocfs2(data: bytes) -> None:
    """The first byte chooses the shape, and whether it is mounted, only read, or checked."""
    choice = data[0] if data else 0
    image = _SHAPES[choice % len(_SHAPES)]()
    device = GuardedDevice(image.device.contents, blocks_max=_WORK_BLOCKS_MAX)
    change(image, device, Reader(data[1:]))
    way = choice >> 2 & 7
    if way < 2:
        device.read_only = True
        with _refused():
            for problem in check(device):
                hold(bool(str(problem)), "a problem without words")
        return
    device.read_only = way == 2
    with _refused():
        fs = Ocfs2(
            device,
            clock_ns=_clock,
            node=choice >> 5,
            read_only=way == 2,
            keep_checksums=bool(choice & 4),
            random_bytes=lambda n: b"s" * n,
        )
        _use(Vfs(fs, DirectPages(fs, fs.checksums)), fs)
        if way == 7:
            # Whoever comes next, or mends it, finds what this one has left.
            device.read_only = True
            check(device)


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except ImageError as reason:
        hold("\n" not in str(reason), "a refusal of several lines")


def _use(vfs: Vfs, fs: Ocfs2) -> None:
    attempt(lambda: volume_status(fs, ()))
    attempt(lambda: list(fs.scan_orphans()))
    if fs.checksums is not None:
        attempt(lambda: _verify(vfs, fs))
    used_hard(vfs, _KNOWN, paths_max=len(_KNOWN) + _MORE_PATHS, written_bytes=9000)
    for slot in range(len(fs.slot_nodes()) if not fs.read_only else 0):
        if slot != fs.slot:
            attempt(functools.partial(fs.recover_slot, slot))
    attempt(fs.free_orphans)
    attempt(vfs.sync)
    attempt(vfs.unmount)


def _verify(vfs: Vfs, fs: Ocfs2) -> None:
    assert fs.checksums is not None
    for path, indexes in (("/d/f", (0, 1, 2)), ("/big", (0, 1, 500))):
        handle = vfs.open(path)
        inode = vfs.inode_of(handle)
        with fs.reading(inode):
            for index in indexes:
                page = vfs.pread(handle, BLOCK_BYTES, index * BLOCK_BYTES)
                fs.checksums.matches(inode, index, memoryview(page.ljust(BLOCK_BYTES, b"\0")))
        vfs.close(handle)
