"""An image with a bit of everything in it, and ways to damage one field of it."""

from __future__ import annotations

import os
from pathlib import Path

from fs.block.device import BLOCK_BYTES, Bytes, check_extent
from fs.block.file import FileDevice
from fs.ocfs2.format import (
    BLOCK_EXTENTS,
    DINODE_EXTENTS,
    DIR_ENTRY,
    EXTENT_BLOCK_LIST_OFFSET,
    ID2_OFFSET,
    ChainRecord,
    ExtentListHeader,
    ExtentRecord,
    Structure,
    chain_offset,
    read_extent,
    write_extent,
)
from fs.ocfs2.fsck.checker import check
from fs.ocfs2.fsck.problems import Problem
from fs.ocfs2.mkfs import Parameters, make_volume
from tests.support.ocfs2 import Volume, write

SYSTEM_DIR = 6
_ZEROS = bytes(BLOCK_BYTES)
ROOT = 5


class Memory:
    """A device that can only be read."""

    block_bytes = BLOCK_BYTES
    read_only = True

    def __init__(self, raw: bytes | bytearray) -> None:
        self._raw = raw
        self.blocks = len(raw) // BLOCK_BYTES

    def read(self, block: int, count: int, into: memoryview) -> None:
        check_extent(self, block, count, into.nbytes)
        into[:] = memoryview(self._raw)[block * BLOCK_BYTES : (block + count) * BLOCK_BYTES]

    def write(self, block: int, count: int, data: Bytes) -> None:
        raise AssertionError(f"a check writes {count} blocks at {block}: {len(data)} bytes")

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class Sample:
    """Bytes of an image, and where things are in it; `save` puts them into a file."""

    def __init__(self, path: Path, raw: bytes) -> None:
        self.path = path
        self.raw = bytearray(raw)
        self.system = dict(self.entries(SYSTEM_DIR))

    def block(self, number: int) -> memoryview:
        return memoryview(self.raw)[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]

    def change(
        self, kind: type[Structure], block: int, at: int | None = None, /, **values: object
    ) -> None:
        """Set fields of a structure; a function as value gets the old one."""
        structure = kind.read(self.block(block), at)
        for name, value in values.items():
            old = getattr(structure, name)
            setattr(structure, name, value(old) if callable(value) else value)
        structure.write_into(self.block(block), at)

    def data_block(self, ino: int) -> int:
        """First block of a file without extent blocks."""
        return read_extent(self.block(ino), ID2_OFFSET, 0, leaf=True).block

    def group(self, allocator: bytes) -> int:
        """First group of an allocator."""
        return ChainRecord.read(self.block(self.system[allocator]), chain_offset(0)).block

    def extent(self, block: int, index: int, /, **values: int) -> None:
        """Change a leaf record in a dinode (`block` has no extent blocks) or an extent block."""
        offset = EXTENT_BLOCK_LIST_OFFSET if bytes(self.block(block)[:2]) == b"EX" else ID2_OFFSET
        record = read_extent(self.block(block), offset, index, leaf=True)
        write_extent(self.block(block), offset, index, record._replace(**values))

    def inner(self, ino: int, index: int) -> ExtentRecord:
        """A record in an inode whose tree has a depth."""
        return read_extent(self.block(ino), ID2_OFFSET, index, leaf=False)

    def list_head(self, block: int, /, **values: object) -> None:
        """Change the head of the extent list in a dinode or extent block."""
        offset = EXTENT_BLOCK_LIST_OFFSET if bytes(self.block(block)[:2]) == b"EX" else ID2_OFFSET
        self.change(ExtentListHeader, block, offset, **values)

    def entries(self, ino: int) -> list[tuple[bytes, int]]:
        return [(name, target) for name, target, _offset in self._entries(ino)]

    def _entries(self, ino: int) -> list[tuple[bytes, int, int]]:
        block = self.block(self.data_block(ino))
        found, offset = [], 0
        while offset < BLOCK_BYTES:
            target, length, name_bytes, _kind = DIR_ENTRY.unpack_from(block, offset)
            start = offset + DIR_ENTRY.size
            found.append((bytes(block[start : start + name_bytes]), target, offset))
            offset += length
        return found

    def find(self, *names: bytes) -> int:
        """The inode at a path from the root."""
        ino = ROOT
        for name in names:
            ino = dict(self.entries(ino))[name]
        return ino

    def entry(
        self,
        ino: int,
        name: bytes,
        *,
        target: int | None = None,
        length: int | None = None,
        name_bytes: int | None = None,
        kind: int | None = None,
        text: bytes | None = None,
    ) -> None:
        """Change the entry `name` of a directory."""
        block = self.block(self.data_block(ino))
        offset = next(offset for found, _, offset in self._entries(ino) if found == name)
        old = DIR_ENTRY.unpack_from(block, offset)
        new = (target, length, name_bytes, kind)
        values = [
            before if after is None else after for before, after in zip(old, new, strict=True)
        ]
        DIR_ENTRY.pack_into(block, offset, *values)
        if text is not None:
            start = offset + DIR_ENTRY.size
            block[start : start + len(text)] = text

    def flip(self, block: int, bit: int, at: int = 0) -> None:
        """Invert a bit."""
        self.block(block)[at + (bit >> 3)] ^= 1 << (bit & 7)

    def save(self) -> Path:
        """A sparse file with these bytes."""
        with self.path.open("wb") as file:
            file.truncate(len(self.raw))
            for number in range(len(self.raw) // BLOCK_BYTES):
                block = bytes(self.block(number))  # a memoryview is compared item by item
                if block != _ZEROS:
                    file.seek(number * BLOCK_BYTES)
                    file.write(block)
        return self.path

    def check(self) -> list[Problem]:
        """What our checker says of the bytes as they are."""
        return check(Memory(self.raw))


def make_sample(path: Path) -> bytes:
    """24 MiB with files, directories, links of both kinds, and two files with extent blocks."""
    path.write_bytes(b"")
    os.truncate(path, 24 << 20)
    device = FileDevice(path)
    make_volume(
        device,
        Parameters(slots=2, uuid=bytes(range(16)), generation=0x5EED, now_s=1_700_000_000),
        fresh=True,
    )
    device.close()
    volume = Volume(path)
    vfs = volume.mount()
    vfs.mkdir("/folder")
    vfs.mkdir("/folder/inner")
    for number in range(12):
        write(vfs, f"/folder/file{number}", b"x" * (number * 1500))
    vfs.symlink("short", "/short")
    vfs.symlink("l" * 3950, "/long")
    vfs.link("/folder/file1", "/hard")
    handles = [vfs.open(f"/big{number}", os.O_CREAT | os.O_RDWR) for number in range(2)]
    for index in range(256):
        for handle in handles:
            vfs.pwrite(handle, b"y" * BLOCK_BYTES, index * BLOCK_BYTES)
    for handle in handles:
        vfs.close(handle)
    volume.unmount()
    return path.read_bytes()


assert BLOCK_EXTENTS < 256 > DINODE_EXTENTS
