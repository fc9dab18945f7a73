"""Disks whose owner has written anything into the places that file systems read first.

The bytes are changes of a sound image: which of its metadata blocks, where, and what.

`ext`      an ext2 image, mounted, walked, read and written;
`ocfs2`    an OCFS2 volume, the same, or looked at by our fsck;
`journal`  a jbd2 log of any form with four transactions in it, recovered;
`swap`     the header of a swap area.

Findings are any exception but `ImageError` and `OSError`, a block outside of the device (the device
itself says so), a recovery that changed something and was refused, and headers that make no sense
and were taken.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fs.block.counting import CountingDevice
from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.block.memory import MemoryDevice
from fs.directpages import DirectPages
from fs.errors import ImageError
from fs.ext.filesystem import ExtFileSystem
from fs.jbd2 import format as jbd2
from fs.jbd2.area import Area
from fs.jbd2.journal import Journal, format_journal
from fs.jbd2.recovery import recover, unreplayed
from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.fsck.checker import check
from fs.ocfs2.mkfs import Parameters, blocks_needed, make_volume
from fs.vfs import Vfs
from guests.swapheader import BAD_PAGES_MAX, make_swap, read_header
from tests.fuzz.reading import Reader, hold
from tests.support.tools import need_tool

CHANGES_MAX: Final = 12
READ_BYTES_MAX: Final = 1 << 15
PATHS_MAX: Final = 12
_NOW_NS: Final = 1_767_225_600_000_000_000
_UUID: Final = bytes(range(16))
_DIRECTORY: Final = 0o40755


def _clock() -> int:
    return _NOW_NS


def _change(device: MemoryDevice, blocks: list[int], reader: Reader) -> None:
    """Write what the bytes say into these blocks."""
    for _ in range(CHANGES_MAX):
        if reader.left <= 0:
            break
        control = reader.byte()
        block = blocks[control % len(blocks)]
        content = bytearray(device.contents[block])
        size = reader.byte()
        # Most that is read lies at the start of a block or a structure of 32 bytes.
        at = int.from_bytes(reader.take(2), "little") % BLOCK_BYTES
        written = reader.take(1 + size % 16)
        if size >= 240:
            content = bytearray(device.contents[blocks[at % len(blocks)]])
        else:
            content[at : at + len(written)] = written[: BLOCK_BYTES - at]
        device.contents[block] = bytes(content)


def _use(vfs: Vfs) -> None:
    """Read what can be read, then change and remove it; errors are allowed."""
    paths = ["/a", "/d", "/d/f", "/link"]

    def walk() -> None:
        for path, directories, others in vfs.walk():
            paths.extend(f"{path.rstrip('/')}/{name}" for name in directories + others)
            if len(paths) > PATHS_MAX:
                break

    _attempt(walk)
    for path in paths[:PATHS_MAX]:
        for call in (_read_ends, _change_file):
            _attempt(functools.partial(call, vfs, path))
        for one in (vfs.readlink, vfs.listdir, vfs.lstat):
            _attempt(functools.partial(one, path))
        _attempt(functools.partial(vfs.rename, path, path + "-2"))
        _attempt(functools.partial(vfs.mkdir, path))
        _attempt(functools.partial(vfs.unlink, path + "-2"))
        _attempt(functools.partial(vfs.rmdir, path))
    _attempt(vfs.sync)
    _attempt(vfs.unmount)


def _read_ends(vfs: Vfs, path: str) -> None:
    handle = vfs.open(path)
    try:
        vfs.pread(handle, READ_BYTES_MAX, 0)
        size = vfs.fstat(handle).st_size
        vfs.pread(handle, READ_BYTES_MAX, max(0, size - READ_BYTES_MAX))
    finally:
        vfs.close(handle)


def _change_file(vfs: Vfs, path: str) -> None:
    vfs.truncate(path, 5)
    handle = vfs.open(path + "-new", os.O_RDWR | os.O_CREAT)
    try:
        vfs.write(handle, b"x" * 9000)
    finally:
        vfs.close(handle)


def _attempt(call: Callable[[], object]) -> None:
    try:
        call()
    except OSError as reason:
        hold(reason.errno is not None, "an error without a number")


def _populate(vfs: Vfs) -> None:
    """A little of everything."""
    vfs.mkdir("/d")
    vfs.symlink("/d/f", "/link")
    for path, size in (("/a", 3), ("/d/f", 14 * BLOCK_BYTES)):
        handle = vfs.open(path, os.O_RDWR | os.O_CREAT)
        vfs.write(handle, b"f" * size)
        vfs.close(handle)
    vfs.unmount()


# --- ext


@functools.cache
def _ext_image() -> tuple[MemoryDevice, list[int]]:
    """512 KiB of ext2, and its blocks that are not empty: metadata for the most part."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "image"
        path.write_bytes(bytes(128 * BLOCK_BYTES))
        options = [
            "-t",
            "ext2",
            "-b",
            "4096",
            "-N",
            "64",
            "-U",
            "00010203-0405-0607-0809-0a0b0c0d0e0f",
        ]
        subprocess.run(
            [
                need_tool("mke2fs"),
                "-q",
                "-F",
                *options,
                "-E",
                "hash_seed=00010203-0405-0607-0809-0a0b0c0d0e0f",
                str(path),
            ],
            check=True,
            env={**os.environ, "E2FSPROGS_FAKE_TIME": str(_NOW_NS // 10**9)},
        )
        raw = path.read_bytes()
    device = MemoryDevice([raw[at : at + BLOCK_BYTES] for at in range(0, len(raw), BLOCK_BYTES)])
    mounted = ExtFileSystem(device, clock_ns=_clock)
    _populate(Vfs(mounted, DirectPages(mounted)))
    return device, _used(device)


def _used(device: MemoryDevice) -> list[int]:
    data = {bytes(BLOCK_BYTES), b"f" * BLOCK_BYTES}
    return [number for number, content in enumerate(device.contents) if content not in data]


def fuzz_ext(data: bytes) -> None:
    """Mount, use, unmount."""
    sound, blocks = _ext_image()
    device = sound.copy()
    _change(device, blocks, Reader(data))
    try:
        mounted = ExtFileSystem(device, clock_ns=_clock)
    except ImageError as reason:
        hold("\n" not in str(reason), "a refusal of several lines")
        return
    _use(Vfs(mounted, DirectPages(mounted)))


# --- ocfs2


@functools.cache
def _ocfs2_volume() -> tuple[MemoryDevice, list[int]]:
    parameters = Parameters(slots=2, uuid=_UUID, generation=7, now_s=_NOW_NS // 10**9)
    device = MemoryDevice.empty(blocks_needed(parameters) + 64)
    make_volume(device, parameters, fresh=True)
    mounted = Ocfs2(device, clock_ns=_clock)
    _populate(Vfs(mounted, DirectPages(mounted)))
    return device, _used(device)


def fuzz_ocfs2(data: bytes) -> None:
    """The first byte chooses between a mount and our fsck."""
    sound, blocks = _ocfs2_volume()
    device = sound.copy()
    _change(device, blocks, Reader(data[1:]))
    try:
        if data[:1] and data[0] % 3 == 0:
            for problem in check(device):
                hold(bool(str(problem)), "a problem without words")
            return
        mounted = Ocfs2(device, clock_ns=_clock, read_only=bool(data[:1]) and data[0] % 3 == 1)
    except ImageError as reason:
        hold("\n" not in str(reason), "a refusal of several lines")
        return
    _use(Vfs(mounted, DirectPages(mounted)))


# --- journal

_HOME_BLOCKS: Final = 24
_JOURNAL_BLOCKS: Final = 24
_FORMS: Final = (
    (0, 0),
    (0, jbd2.INCOMPAT_64BIT),
    (jbd2.COMPAT_CHECKSUM, 0),
    (0, jbd2.INCOMPAT_CSUM_V2),
    (0, jbd2.INCOMPAT_CSUM_V3 | jbd2.INCOMPAT_64BIT),
)


def _area(device: BlockDevice) -> Area:
    """Two runs, the later one first, as a file may have them."""
    half, end = _HOME_BLOCKS + _JOURNAL_BLOCKS // 2, _HOME_BLOCKS + _JOURNAL_BLOCKS
    return Area(device, [*range(half, end), *range(_HOME_BLOCKS, half)])


@functools.cache
def _crashed(form: int) -> MemoryDevice:
    """A log of four transactions that nobody has brought home."""
    compat, incompat = _FORMS[form]
    device = MemoryDevice.empty(_HOME_BLOCKS + _JOURNAL_BLOCKS)
    format_journal(_area(device), _UUID, compat=compat, incompat=incompat)
    journal = Journal(_area(device), now_ns=_clock)
    for number in range(4):
        image = jbd2.MAGIC_BYTES + bytes([number]) * (BLOCK_BYTES - 4)
        journal.commit({number: image, 5: image}, [20 + number] if number else [])
    return device


def fuzz_journal(data: bytes) -> None:
    """Recover, within bounds; what is refused has changed nothing."""
    form = data[0] % len(_FORMS) if data else 0
    device = _crashed(form).copy()
    area = _area(device)
    _change(device, list(area.blocks), Reader(data[1:]))
    if data and data[0] & 128:
        _seal_superblock(device, area)
    counting = CountingDevice(device)
    before = list(device.contents)
    try:
        found = recover(_area(counting))
    except ImageError:
        found = None
    except OSError as reason:
        hold(reason.errno == errno.EUCLEAN, f"a refusal with {reason}")
        found = None
    if found is None:
        hold(device.contents == before, "a refused log was replayed in part")
        return
    # Each pass visits a block once, the last one reads what it writes.
    hold(counting.read_pages <= 4 * _JOURNAL_BLOCKS, "the log was read for ever")
    changed = {n for n, content in enumerate(device.contents) if content is not before[n]}
    hold(changed <= {*range(_HOME_BLOCKS), area.blocks[0]}, "a write beside the home blocks")
    hold(not unreplayed(_area(device)), "something is left to replay")


def _seal_superblock(device: MemoryDevice, area: Area) -> None:
    """Give a superblock that was changed its checksum again."""
    raw = bytearray(device.contents[area.blocks[0]])
    raw[252:256] = bytes(4)
    struct.pack_into(">I", raw, 252, jbd2.checksum(0xFFFF_FFFF, memoryview(raw)[:1024]))
    device.contents[area.blocks[0]] = bytes(raw)


# --- swap


def fuzz_swap(data: bytes) -> None:
    """Changes of a header, on a device of 16 pages."""
    device = MemoryDevice.empty(16)
    make_swap(device, uuid=_UUID, label="fuzz")
    reader = Reader(data)
    if reader.byte() & 1:
        # Places that have a meaning, most of the time.
        page = bytearray(device.contents[0])
        page[1024:1068] = reader.take(44)
        bad = reader.take(24)
        page[1536 : 1536 + len(bad)] = bad
        page[4086:] = reader.take(10) if reader.byte() & 1 else page[4086:]
        device.contents[0] = bytes(page)
    _change(device, [0, 0, 0, 1, 3, 7, 15], reader)
    try:
        header = read_header(device)
    except ImageError as reason:
        hold("\n" not in str(reason), "a refusal of several lines")
        return
    hold(0 < header.last_page < device.blocks, "pages that are not there")
    hold(len(header.bad_pages) <= BAD_PAGES_MAX, "too many bad pages")
    bad_pages = set(header.bad_pages)
    hold(len(bad_pages) == len(header.bad_pages), "a bad page twice")
    hold(bad_pages < set(range(1, header.last_page + 1)), "bad pages that are not there")
