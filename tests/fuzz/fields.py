"""Sound metadata, and bytes taken as changes of its fields.

Bytes that are changed anywhere hit something that means nothing, or are refused by the first check
that they meet.  So a change names a block, one of the fields that its kind of block has, and what
becomes of it: a bit flipped, a little more or less, the ends of what the field can hold, or a
number that means something elsewhere in the image.  One in eight changes is of bytes at any place,
and one copies a whole block, so that nothing is out of reach.

All changes have the same length: libFuzzer can cut and join them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple

from fs.block.device import BLOCK_BYTES, Bytes
from fs.block.memory import MemoryDevice
from tests.fuzz.reading import Reader, hold

CHANGES_MAX: Final = 12
CHANGE_BYTES: Final = 8

_TOKEN: Final = re.compile(r"(\d*)([a-zA-Z])")
_ALIGNED: Final = "<"


class Field(NamedTuple):
    """Where a number lies in a block, and with which end first."""

    at: int
    size: int
    order: Literal["little", "big"] = "little"


def fields_of(layout: struct.Struct | str, at: int = 0) -> list[Field]:
    """The fields of a packed structure that begins at `at`."""
    text = layout if isinstance(layout, str) else layout.format
    order: Literal["little", "big"] = "big" if text[0] == ">" else "little"
    found = []
    for digits, letter in _TOKEN.findall(text):
        size, count = struct.calcsize(_ALIGNED + letter), int(digits or 1)
        if letter in "sx":
            size, count = count, 1
        for _ in range(count):
            if letter != "x":
                found.append(Field(at, size, order))
            at += size
    return found


class Image(NamedTuple):
    """A sound disk, the blocks of it that mean something, their fields, and numbers in use."""

    device: MemoryDevice
    blocks: list[int]
    fields: list[list[Field]]
    numbers: list[int]


def image_of(device: MemoryDevice, described: Iterable[tuple[int, list[Field]]]) -> Image:
    """With the fields of each block that has any."""
    kept = [(number, fields) for number, fields in described if fields]
    blocks = [number for number, _ in kept]
    ends = [0, 1, device.blocks - 1, device.blocks]
    return Image(device, blocks, [fields for _, fields in kept], [*ends, *blocks])


def change(image: Image, device: MemoryDevice, reader: Reader) -> list[int]:
    """Write what the bytes say into a copy of the image; the blocks that were written."""
    written = []
    for _ in range(CHANGES_MAX):
        if reader.left <= 0:
            break
        one = Reader(reader.take(CHANGE_BYTES))
        choice = int.from_bytes(one.take(2), "little") % len(image.blocks)
        block = image.blocks[choice]
        content = bytearray(device.contents[block])
        kind = one.byte()
        if kind >> 5 == 0:
            content = _change_bytes(content, one)
        elif kind == 255:
            other = int.from_bytes(one.take(2), "little") % len(image.blocks)
            content[:] = device.contents[image.blocks[other]]
        else:
            fields = image.fields[choice]
            field = fields[int.from_bytes(one.take(2), "little") % len(fields)]
            _change_field(content, field, kind, one, image.numbers)
        device.contents[block] = bytes(content)
        written.append(block)
    return written


def _change_bytes(content: bytearray, one: Reader) -> bytearray:
    at = int.from_bytes(one.take(2), "little") % BLOCK_BYTES
    content[at : at + 3] = one.take(3)
    return content[:BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0")


def _change_field(
    content: bytearray, field: Field, kind: int, one: Reader, numbers: Sequence[int]
) -> None:
    at, size, order = field
    old = int.from_bytes(content[at : at + size], order)
    argument = int.from_bytes(one.take(2), "little")
    all_ones = (1 << 8 * size) - 1
    match kind % 8:
        case 0:
            new = argument
        case 1:
            new = old + argument - 256
        case 2:
            new = old ^ 1 << argument % (8 * size)
        case 3:
            new = all_ones - argument
        case 4:
            new = (all_ones >> 1) + argument % 3
        case 5 | 6:
            new = numbers[argument % len(numbers)]
        case _:
            new = int.from_bytes(one.take(1), "little") << argument % (8 * size)
    content[at : at + size] = (new & all_ones).to_bytes(size, order)


class GuardedDevice(MemoryDevice):
    """Tells of work without end, and of blocks that are not there.

    A file system that believes a number of the image too long asks for such a block in the end,
    and would get EINVAL for it, which it may say for other reasons.
    """

    def __init__(
        self, contents: Sequence[bytes], *, blocks_max: int, read_only: bool = False
    ) -> None:
        super().__init__(contents, read_only=read_only)
        self._left = blocks_max

    def _count(self, block: int, count: int) -> None:
        hold(0 <= block < block + count <= self.blocks, f"{count} blocks from {block}")
        self._left -= count
        hold(self._left >= 0, "work without end")

    def read(self, block: int, count: int, into: memoryview) -> None:
        """Read whole blocks."""
        self._count(block, count)
        super().read(block, count, into)

    def write(self, block: int, count: int, data: Bytes) -> None:
        """Write whole blocks."""
        self._count(block, count)
        hold(not self.read_only, "a write to a device that is only read")
        super().write(block, count, data)
