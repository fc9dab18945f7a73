"""jbd2 logs that say anything, with checksums that are right.

A log whose bytes are changed anywhere is refused by the next checksum, and what is behind it is
never read.  So the bytes are taken as one of three things:

    changes of a log of four transactions, as they are: checksums find them;
    the same, and all checksums made anew, those of images and commit blocks too;
    a log that is written block by block: descriptors, revokes and commits of any transaction, in
    any order, round the end of the ring, most of them right.

Findings are any exception but `ImageError` and EUCLEAN, a log that is read for ever, a write beside
the home blocks, a home block that holds no image of the log, something left to replay, a refusal
after something was written, and, of a log that was written without a flaw, other contents than
its transactions give.
"""

from __future__ import annotations

import errno
import functools
import struct
from typing import Final

from fs.block.counting import CountingDevice
from fs.block.device import BLOCK_BYTES, BlockDevice, Bytes
from fs.block.memory import MemoryDevice
from fs.errors import ImageError
from fs.jbd2 import format as jbd2
from fs.jbd2.area import Area
from fs.jbd2.journal import Journal, format_journal
from fs.jbd2.layout import FLAG_LAST, FLAG_SAME_UUID, Crc32, Layout, Tag, escape
from fs.jbd2.recovery import recover, unreplayed
from tests.fuzz.fields import Field, Image, change, fields_of, image_of
from tests.fuzz.reading import Reader, hold

HOME_BLOCKS: Final = 24
JOURNAL_BLOCKS: Final = 24
_UUID: Final = bytes(range(16))
_NOW_NS: Final = 1_767_225_600_000_000_000
_FORMS: Final = (
    (0, 0),
    (0, jbd2.INCOMPAT_64BIT),
    (jbd2.COMPAT_CHECKSUM, 0),
    (0, jbd2.INCOMPAT_CSUM_V2),
    (0, jbd2.INCOMPAT_CSUM_V2 | jbd2.INCOMPAT_64BIT),
    (0, jbd2.INCOMPAT_CSUM_V3 | jbd2.INCOMPAT_64BIT),
    (0, jbd2.INCOMPAT_CSUM_V3 | jbd2.INCOMPAT_ASYNC_COMMIT),
    (jbd2.COMPAT_CHECKSUM, jbd2.INCOMPAT_ASYNC_COMMIT | jbd2.INCOMPAT_REVOKE),
)
_FIRST_TIDS: Final = (1, 7, 0x7FFF_FFFF, 0xFFFF_FFFE)
_WORD: Final = struct.Struct(">I")
_SUPER_BYTES: Final = 1024
_SUPER_CHECKSUM_AT: Final = 252
_COMMIT_CHECKSUM_AT: Final = 16
_UUID_BYTES: Final = 16
_TAGS_SHOWN: Final = 3
_EMPTY: Final = bytes(BLOCK_BYTES)


def _clock() -> int:
    return _NOW_NS


def area_of(device: BlockDevice) -> Area:
    """Two runs, the later one first, as a file may have them."""
    half, end = HOME_BLOCKS + JOURNAL_BLOCKS // 2, HOME_BLOCKS + JOURNAL_BLOCKS
    return Area(device, [*range(half, end), *range(HOME_BLOCKS, half)])


def log_fields(content: bytes | bytearray, tag_bytes: int = 12) -> list[Field]:
    """The fields of a block of a journal; none of one that has not its magic number."""
    magic, kind, _ = jbd2.HEADER.unpack_from(content)
    if magic != jbd2.MAGIC:
        return []
    fields = fields_of(jbd2.HEADER)
    if kind in (jbd2.SUPERBLOCK_V1, jbd2.SUPERBLOCK_V2):
        return [*fields, *fields_of(">5Ii 3I", 12), *fields_of(">16sI", 48), Field(80, 1)]
    if kind == jbd2.DESCRIPTOR:
        firsts = [12, *(28 + tag_bytes * number for number in range(1, _TAGS_SHOWN))]
        return fields + [one for first in firsts for one in fields_of(">IHHIHH", first)]
    if kind == jbd2.REVOKE:
        return fields + fields_of(">I6I", 12)
    return fields + fields_of(">BBH8I", 12)


@functools.cache
def _crashed(form: int) -> Image:
    """A log of four transactions that nobody has brought home."""
    compat, incompat = _FORMS[form]
    device = MemoryDevice.empty(HOME_BLOCKS + JOURNAL_BLOCKS)
    area = area_of(device)
    format_journal(area, _UUID, compat=compat, incompat=incompat)
    journal = Journal(area, now_ns=_clock)
    for number in range(4):
        image = jbd2.MAGIC_BYTES + bytes([number]) * (BLOCK_BYTES - 4)
        journal.commit({number: image, 5: image}, [20 + number] if number else [])
    tag_bytes = Layout(compat, incompat, _UUID).tag_bytes
    described = [(block, log_fields(device.contents[block], tag_bytes)) for block in area.blocks]
    return image_of(device, described)


def fuzz_journal(data: bytes) -> None:
    """The first byte chooses the form, and which of the three things happens."""
    choice = data[0] if data else 0
    form = choice % len(_FORMS)
    reader = Reader(data[1:])
    device = _crashed(form).device.copy()
    expected = None
    if choice >> 6 < 2:
        change(_crashed(form), device, reader)
        if choice >> 6:
            _seal(area_of(device))
    else:
        expected = _Writer(device, form, reader).write()
    _recover(device, expected)


def _recover(device: MemoryDevice, expected: dict[int, bytes] | None) -> None:
    """Within bounds; what is refused has changed nothing."""
    area = area_of(device)
    counting = CountingDevice(device)
    before = list(device.contents)
    in_log = {before[block] for block in area.blocks}
    # Of a block that is said to have begun with the magic number the log's first word is ignored.
    behind_word = {content[4:] for content in in_log}
    try:
        found = recover(area_of(counting))
    except ImageError as reason:
        hold("\n" not in str(reason), "a refusal of several lines")
        found = None
    except OSError as reason:
        hold(reason.errno == errno.EUCLEAN, f"a refusal with {reason}")
        found = None
    if found is None:
        hold(device.contents == before, "a refused log was replayed in part")
        hold(expected is None, "a log without a flaw was refused")
        return
    # Each pass visits a block once, the last one reads what it writes.
    hold(counting.read_pages <= 4 * JOURNAL_BLOCKS, "the log was read for ever")
    changed = {n for n, content in enumerate(device.contents) if content is not before[n]}
    hold(changed <= {*range(HOME_BLOCKS), area.blocks[0]}, "a write beside the home blocks")
    for block in changed - {area.blocks[0]}:
        image = device.contents[block]
        escaped = image[:4] == jbd2.MAGIC_BYTES and image[4:] in behind_word
        hold(image in in_log or escaped, "a home block with what no log has said")
    hold(not unreplayed(area_of(device)), "something is left to replay")
    if expected is not None:
        home = {block: device.contents[block] for block in changed - {area.blocks[0]}}
        hold(home == expected, "other contents than the log's transactions give")


# --- checksums


def _seal(area: Area) -> None:
    """Make all checksums of a log anew, as whoever writes it would."""
    raw = area.read(0)
    compat, incompat, _, uuid = struct.unpack_from(">III16s", raw, 36)
    area.write(0, _sealed_superblock(raw))
    layout = Layout(compat, incompat, uuid)
    first, _, start = struct.unpack_from(">3I", raw, 20)
    ring = list(range(first, len(area))) if 0 < first < len(area) else list(range(1, len(area)))
    if start in ring:
        ring = ring[ring.index(start) :] + ring[: ring.index(start)]
    crc32 = Crc32()
    while ring:
        index = ring.pop(0)
        block = area.read(index)
        magic, kind, tid = jbd2.HEADER.unpack_from(block)
        if magic != jbd2.MAGIC:
            continue
        if kind == jbd2.DESCRIPTOR:
            images = [area.read(at) for at in ring[: len(layout.tags(block))]]
            del ring[: len(images)]
            _seal_tags(layout, block, tid, images)
            _seal_tail(layout, block)
            for part in (block, *images):
                crc32.add(part)
        elif kind == jbd2.REVOKE:
            _seal_tail(layout, block)
        elif kind == jbd2.COMMIT:
            _seal_commit(layout, block, crc32)
            crc32 = Crc32()
        area.write(index, block)


def _sealed_superblock(raw: bytearray) -> bytes:
    raw[_SUPER_CHECKSUM_AT : _SUPER_CHECKSUM_AT + 4] = bytes(4)
    value = jbd2.checksum(0xFFFF_FFFF, memoryview(raw)[:_SUPER_BYTES])
    _WORD.pack_into(raw, _SUPER_CHECKSUM_AT, value)
    return bytes(raw)


def _seal_tags(layout: Layout, block: bytearray, tid: int, images: list[bytearray]) -> None:
    """As `Layout.tags` goes through them."""
    if not layout.has_crc32c:
        return
    at = jbd2.HEADER.size
    for image in images:
        value = layout.image_checksum(tid, image)
        if layout.tag_bytes == 16:
            _WORD.pack_into(block, at + 12, value)
            (flags,) = _WORD.unpack_from(block, at + 4)
        else:
            struct.pack_into(">H", block, at + 4, value)
            (flags,) = struct.unpack_from(">H", block, at + 6)
        if flags & FLAG_LAST:
            break
        at += layout.tag_bytes + (0 if flags & FLAG_SAME_UUID else _UUID_BYTES)


def _seal_tail(layout: Layout, block: bytearray) -> None:
    if layout.has_crc32c:
        end = BLOCK_BYTES - 4
        sum_ = jbd2.checksum(layout._seed, memoryview(block)[:end], bytes(4))
        _WORD.pack_into(block, end, sum_)


def _seal_commit(layout: Layout, block: bytearray, crc32: Crc32) -> None:
    if layout.has_crc32:
        block[12:14] = b"\1\4"
        _WORD.pack_into(block, _COMMIT_CHECKSUM_AT, crc32.value)
    elif layout.has_crc32c:
        _WORD.pack_into(block, _COMMIT_CHECKSUM_AT, 0)
        _WORD.pack_into(block, _COMMIT_CHECKSUM_AT, jbd2.checksum(layout._seed, block))


# --- a log from bytes


class _Writer:
    """Writes a log block by block, and keeps what its transactions give as long as all is right."""

    def __init__(self, device: MemoryDevice, form: int, reader: Reader) -> None:
        compat, incompat = _FORMS[form]
        self._device = device
        self._reader = reader
        self._layout = Layout(compat, incompat, _UUID)
        self._area = area_of(device)
        for block in self._area.blocks[1:]:
            device.contents[block] = _EMPTY
        choice = reader.byte()
        self._first = 1 + (choice >> 6)
        self._at = self._first + (choice & 31) % (JOURNAL_BLOCKS - self._first)
        self._tid = _FIRST_TIDS[choice >> 5 & 3]
        self._left = JOURNAL_BLOCKS - self._first
        raw = self._area.read(0)
        struct.pack_into(">3I", raw, 20, self._first, self._tid, self._at)
        self._area.write(0, _sealed_superblock(raw) if self._layout.has_crc32c else bytes(raw))
        self._right = True
        self._crc32 = Crc32()
        self._images: dict[int, bytes] = {}
        self._revoked: set[int] = set()
        self._home: dict[int, bytes] = {}

    def write(self) -> dict[int, bytes] | None:
        """All of it; the home blocks that it changes, None if anything about it is odd."""
        while self._left > 0 and self._reader.left > 0:
            control = self._reader.byte()
            odd = control >> 5 == 7
            self._right = self._right and not odd
            match control & 7:
                case 0 | 1 | 2:
                    self._describe(1 + (control >> 3 & 3), odd=odd)
                case 3:
                    self._revoke(control >> 3 & 3, odd=odd)
                case 7:
                    self._put_anything()
                case _:
                    self._commit(odd=odd)
        return self._home if self._right else None

    def _put(self, content: Bytes) -> None:
        self._area.write(self._at, bytes(content).ljust(BLOCK_BYTES, b"\0"))
        self._at += 1
        if self._at == JOURNAL_BLOCKS:
            self._at = self._first
        self._left -= 1

    def _number(self, *, odd: bool) -> int:
        """The transaction that a block says it belongs to."""
        return jbd2.following(self._tid, self._reader.byte() % 4 - 1 if odd else 0)

    def _block(self, *, odd: bool) -> int:
        choice = self._reader.byte()
        if not odd or choice < 128:
            return choice % HOME_BLOCKS
        ends = (HOME_BLOCKS + choice % JOURNAL_BLOCKS, self._device.blocks, 0xFFFF_FFFF, 1 << 63)
        return min(ends[choice >> 4 & 3], self._layout.block_limit - 1)

    def _describe(self, count: int, *, odd: bool) -> None:
        if self._left < count + 2:
            self._right = self._right and self._left > 0
            self._left = 0
            return
        tid = self._number(odd=odd)
        tags = []
        images = []
        for _ in range(count):
            block = self._block(odd=odd)
            choice = self._reader.byte()
            head = jbd2.MAGIC_BYTES if choice & 1 else bytes([choice]) * 4
            image = head + bytes([choice, self._left]) * ((BLOCK_BYTES - 4) // 2)
            stored, escaped = escape(image)
            tags.append(Tag(block, escaped, self._layout.image_checksum(tid, stored)))
            images.append(stored)
            self._images[block] = image
        content = bytearray(self._layout.descriptor(tid, tags))
        if odd and self._reader.byte() & 1:
            place = 12 + self._reader.byte() % 64
            content[place] ^= self._reader.byte()
            _seal_tail(self._layout, content)
        for part in (bytes(content), *images):
            self._crc32.add(part)
            self._put(part)

    def _revoke(self, count: int, *, odd: bool) -> None:
        blocks = [self._block(odd=odd) for _ in range(count)]
        content = bytearray(self._layout.revoke(self._number(odd=odd), blocks))
        if odd and self._reader.byte() & 1:
            _WORD.pack_into(content, 12, int.from_bytes(self._reader.take(2), "big"))
            _seal_tail(self._layout, content)
        self._put(content)
        self._revoked |= set(blocks)

    def _commit(self, *, odd: bool) -> None:
        content = bytearray(self._layout.commit(self._number(odd=odd), _NOW_NS, self._crc32))
        if odd and self._reader.byte() & 1:
            content[self._reader.byte() % 64] ^= self._reader.byte()
        self._put(content)
        if self._right:
            # The newest image of each block; who revokes it later, or at the same time, wins.
            self._home |= self._images
            for block in self._revoked:
                self._home.pop(block, None)
        self._tid = jbd2.following(self._tid)
        self._crc32 = Crc32()
        self._images, self._revoked = {}, set()

    def _put_anything(self) -> None:
        self._right = False
        choice = self._reader.byte()
        kind, tid = choice % 7, jbd2.following(self._tid, (choice >> 3) - 4)
        self._put(jbd2.header(kind, tid) + self._reader.take(choice % 24))
