"""ext2 images of several shapes, and swap areas, whose owner has written anything into them.

`ext`   changes of fields (`fields`) of an image that is mounted then, walked, read and written:
        a small one; one of many groups, with a double indirect file, long directories and
        attributes; the same as a crash leaves it.
`swap`  the header of a swap area; the area is used if the header is taken.

Findings are any exception but `ImageError` and `OSError` with a number that the file system may
say, work without end, blocks that are not there, a write where nothing may be written, and swap
headers that make no sense and were taken.
"""

from __future__ import annotations

import functools
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fs.block.device import BLOCK_BYTES
from fs.block.memory import MemoryDevice
from fs.directpages import DirectPages
from fs.errors import ImageError
from fs.ext.filesystem import ExtFileSystem
from fs.vfs import Vfs
from guests.swapdisk import SwapDisk
from guests.swapheader import BAD_PAGES_MAX, check_owner, make_swap, names_owner, read_header
from guests.volumeview import volume_status
from tests.fuzz.fields import Field, GuardedDevice, Image, change, fields_of, image_of
from tests.fuzz.reading import Reader, hold
from tests.support.damage import attempt, used_hard
from tests.support.tools import need_tool

_NOW_NS: Final = 1_767_225_600_000_000_000
_UUID: Final = bytes(range(16))
_UUID_TEXT: Final = "00010203-0405-0607-0809-0a0b0c0d0e0f"
_WORK_BLOCKS_MAX: Final = 60_000
_KNOWN: Final = ("/d/f", "/big", "/link", "/long", "/hard", "/d", "/a", "/one", "/two")
_MORE_PATHS: Final = 6


def _clock() -> int:
    return _NOW_NS


# --- ext

_SUPER_AT: Final = 1024
_SUPER_FIELDS: Final = (
    *fields_of("<13I6H4I2HI2H3I16s", _SUPER_AT),
    Field(_SUPER_AT + 206, 2),
)
_INODE: Final = struct.Struct("<HHIIIIIHHII4x15IIIII")
_INODES_SHOWN: Final = 16
_DIR_HEAD: Final = struct.Struct("<IHBB")
_ENTRIES_SHOWN: Final = 6
_ATTRIBUTES: Final = 0xEA020000


def _entries(content: bytes) -> list[Field]:
    """The entries of a block of a directory; nothing if it is none."""
    found: list[Field] = []
    at = 0
    for _ in range(_ENTRIES_SHOWN):
        if at + _DIR_HEAD.size > BLOCK_BYTES:
            break
        _ino, length, name_bytes, kind = _DIR_HEAD.unpack_from(content, at)
        if length < _DIR_HEAD.size or length % 4 or kind > 7 or name_bytes + 8 > length:
            return []
        found += [*fields_of(_DIR_HEAD, at), Field(at + _DIR_HEAD.size, 1)]
        at += length
    return found


def _ext_fields(number: int, content: bytes, tables: dict[int, int]) -> list[Field]:
    """`tables` are the first blocks of inode tables, and the bytes of an inode there."""
    if number == 0:
        return list(_SUPER_FIELDS)
    if number == 1:
        return [field for group in range(8) for field in fields_of("<3I3H", 32 * group)]
    if number in tables:
        shown = min(_INODES_SHOWN, BLOCK_BYTES // tables[number])
        # An inode begins at 0 in this block, whichever it is; the root is the second.
        return [field for n in range(shown) for field in fields_of(_INODE, n * tables[number])]
    if struct.unpack_from("<I", content)[0] == _ATTRIBUTES:
        return fields_of("<5I")
    return _entries(content) or fields_of("<12I")


def _image(device: MemoryDevice, inode_bytes: int) -> Image:
    groups = struct.iter_unpack("<3I3H14x", device.contents[1])
    tables = {table + n: inode_bytes for _, _, table, *_ in groups if table for n in range(2)}
    ignored = {bytes(BLOCK_BYTES), b"f" * BLOCK_BYTES, b"x" * BLOCK_BYTES}
    return image_of(
        device,
        [
            (number, _ext_fields(number, content, tables))
            for number, content in enumerate(device.contents)
            if content not in ignored
        ],
    )


def _made(blocks: int, *options: str, debugfs: str = "") -> MemoryDevice:
    """What mke2fs makes, the same every time."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "image"
        path.write_bytes(bytes(blocks * BLOCK_BYTES))
        command = [
            need_tool("mke2fs"), "-q", "-F", "-t", "ext2", "-b", "4096", *options,
            "-U", _UUID_TEXT, "-E", f"hash_seed={_UUID_TEXT}", str(path),
        ]  # fmt: skip
        environment = {**os.environ, "E2FSPROGS_FAKE_TIME": str(_NOW_NS // 10**9)}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        if debugfs:
            command = [need_tool("debugfs"), "-w", "-f", "-", str(path)]
            subprocess.run(
                command, check=True, env=environment, input=debugfs, text=True, capture_output=True
            )
        raw = path.read_bytes()
    return MemoryDevice([raw[at : at + BLOCK_BYTES] for at in range(0, len(raw), BLOCK_BYTES)])


def _mounted(device: MemoryDevice, *, buffer_blocks: int = 64) -> Vfs:
    fs = ExtFileSystem(device, clock_ns=_clock, buffer_blocks=buffer_blocks)
    return Vfs(fs, DirectPages(fs))


def _write(vfs: Vfs, path: str, data: bytes, at: int = 0) -> None:
    handle = vfs.open(path, os.O_RDWR | os.O_CREAT)
    vfs.pwrite(handle, data, at)
    vfs.close(handle)


@functools.cache
def _small() -> Image:
    device = _made(128, "-N", "64")
    vfs = _mounted(device)
    vfs.mkdir("/d")
    vfs.symlink("/d/f", "/link")
    _write(vfs, "/a", b"fff")
    _write(vfs, "/d/f", b"f" * 14 * BLOCK_BYTES)
    vfs.unmount()
    return _image(device, 256)


def _with_trees() -> tuple[MemoryDevice, Vfs]:
    names = ("a", "one", "two")
    # Inodes of 128 bytes have no room for attributes, so that each has a block of them.
    commands = [f"write /dev/null {name}\nea_set /{name} user.one {'v' * 40}\n" for name in names]
    device = _made(1024, "-g", "256", "-N", "256", "-I", "128", debugfs="".join(commands))
    vfs = _mounted(device)
    vfs.mkdir("/d")
    vfs.mkdir("/d/inner")
    _write(vfs, "/d/f", b"f" * 3 * BLOCK_BYTES)
    for number in range(40):
        _write(vfs, f"/d/{number:0200}", b"x" if number < 2 else b"")
    vfs.symlink("d/f", "/link")
    vfs.symlink("l" * 200, "/long")
    vfs.link("/d/f", "/hard")
    # Direct, indirect, double and triple indirect blocks.
    for page in (0, 12, 20, 12 + 1024, 12 + 1024 + 1030, 12 + 1024 + 1024**2 + 5):
        _write(vfs, "/big", b"end", page * BLOCK_BYTES)
    return device, vfs


@functools.cache
def _trees() -> Image:
    device, vfs = _with_trees()
    vfs.unmount()
    return _image(device, 128)


@functools.cache
def _crashed() -> Image:
    device, vfs = _with_trees()
    vfs.open("/two")
    vfs.unlink("/two")
    vfs.sync()
    left = device.copy()
    vfs.unmount()
    return _image(left, 128)


_SHAPES: Final[tuple[Callable[[], Image], ...]] = (_small, _trees, _trees, _crashed)


def fuzz_ext(data: bytes) -> None:
    """The first byte chooses the shape, and how it is mounted; then use, unmount."""
    choice = data[0] if data else 0
    image = _SHAPES[choice % len(_SHAPES)]()
    read_only = choice >> 2 & 7 == 0
    device = GuardedDevice(image.device.contents, blocks_max=_WORK_BLOCKS_MAX, read_only=read_only)
    change(image, device, Reader(data[1:]))
    try:
        vfs = _mounted(device, buffer_blocks=8 if choice & 128 else 64)
    except ImageError as reason:
        hold("\n" not in str(reason), "a refusal of several lines")
        return
    fs = vfs.fs
    assert isinstance(fs, ExtFileSystem)
    attempt(lambda: volume_status(fs, ()))
    used_hard(vfs, _KNOWN, paths_max=len(_KNOWN) + _MORE_PATHS, written_bytes=9000)
    attempt(vfs.sync)
    attempt(vfs.unmount)


# --- swap

_PAGES: Final = 24
_FIELDS_AT: Final = 1024
_BAD_PAGES_AT: Final = 1536
_SIGNATURES: Final = (
    b"SWAP-SPACE", b"S1SUSPEND\0", b"S2SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001", b"SWAPSPACE3",
)  # fmt: skip


@functools.cache
def _area() -> Image:
    device = MemoryDevice.empty(_PAGES)
    make_swap(device, uuid=_UUID, label="fuzz")
    header = [*fields_of("<III16s16s", _FIELDS_AT), *fields_of("<6I", _BAD_PAGES_AT)]
    others = [(page, [Field(BLOCK_BYTES - 10, 10)]) for page in (1, 3, 7, 15)]
    return image_of(device, [(0, header)] * 4 + [(0, [Field(BLOCK_BYTES - 10, 10)])] + others)


def fuzz_swap(data: bytes) -> None:
    """Changes of a header, whole lists of bad pages, other signatures."""
    device = GuardedDevice(_area().device.contents, blocks_max=_WORK_BLOCKS_MAX)
    reader = Reader(data)
    choice = reader.byte()
    page = bytearray(device.contents[0])
    if choice & 1:
        count = reader.byte() % 28
        struct.pack_into("<I", page, _FIELDS_AT + 8, count)
        for number in range(count):
            struct.pack_into("<I", page, _BAD_PAGES_AT + 4 * number, reader.byte() % (_PAGES + 1))
    if choice & 2:
        struct.pack_into("<I", page, _FIELDS_AT + 4, reader.byte() % (_PAGES + 1))
    device.contents[0] = bytes(page)
    if choice & 4:
        which, place = reader.take(2)
        block = (0, 0, 1, 3, 7, 15)[place % 6]
        signature = (b"SWAPSPACE2", *_SIGNATURES)[which % 7]
        device.contents[block] = device.contents[block][:-10] + signature
        if block:
            device.contents[0] = device.contents[0][:-10] + bytes(10)
    change(_area(), device, reader)
    try:
        header = read_header(device)
        if choice & 8:
            check_owner(header, _UUID)
        names_owner(header.uuid)
        disk = SwapDisk.open(device, uuid=_UUID if choice & 8 else None)
    except ImageError as reason:
        hold("\n" not in str(reason), "a refusal of several lines")
        return
    hold(0 < header.last_page < device.blocks, "pages that are not there")
    hold(len(header.bad_pages) <= BAD_PAGES_MAX, "too many bad pages")
    bad_pages = set(header.bad_pages)
    hold(len(bad_pages) == len(header.bad_pages), "a bad page twice")
    hold(bad_pages < set(range(1, header.last_page + 1)), "bad pages that are not there")
    slots: list[int] = []
    while found := disk.allocate(7):
        slots += found
    hold(sorted(slots) == sorted(set(range(1, header.last_page + 1)) - bad_pages), "other slots")
