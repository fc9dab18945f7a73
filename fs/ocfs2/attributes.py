"""Extended attributes: a block of an inode with names and values, of which we write one.

    inode           i_xattr_loc --> attribute block: header, entries ...  ... names and values
    attribute       its value lies outside: the root of an extent tree with one record, behind the
                    name, and clusters that belong to the inode as its data does

The attribute is the file system's own (`trusted.tmem.checksums`): blocks that are journaled, under
the inode's meta lock, and that Linux and fsck.ocfs2 know how to free, check and show. What others
have set is kept, and freed with the inode. Not here: attributes in an inode's block (the superblock
tells Linux to put none there) and an index of attributes; an inode with one can be read and
written, but whoever wants to free it needs Linux.

Invariants:
  I1  a value has at least one cluster, an attribute block at least one entry, and HAS_XATTR stands
      for a block: Linux takes an empty value for damage;
  I2  clusters are zeros before the transaction that makes them a value's.

Only on a volume with the feature xattr. All methods that change something are called inside an
operation, with the inode's lock in EX; the caller stores the inode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from fs.block.device import BLOCK_BYTES, BlockDevice
from fs.errors import corrupt
from fs.ocfs2.blocks import Buffer
from fs.ocfs2.dinode import Ocfs2Inode
from fs.ocfs2.extents import Extents, Value
from fs.ocfs2.flags import DynFeature
from fs.ocfs2.format import (
    ATTRIBUTE_BLOCK_SIGNATURE,
    ATTRIBUTE_GAP_BYTES,
    ATTRIBUTE_LOCAL,
    ATTRIBUTE_TRUSTED,
    ATTRIBUTES_INDEXED,
    ATTRIBUTES_OFFSET,
    EXTENT_LIST_HEADER_BYTES,
    RECORD_BYTES,
    VALUE_EXTENTS,
    AttributeBlock,
    AttributeEntry,
    AttributesHeader,
    ExtentListHeader,
    ValueRoot,
    name_hash,
)
from fs.ocfs2.space import Space
from fs.ocfs2.transaction import Transactions

NAME: Final = b"tmem.checksums"
CUT_RECORDS_MAX: Final = 32
CUT_BLOCKS_MAX: Final = 256
"""Of one value, freed in one operation: each may need a record in the journal that says so."""
_ROOT_BYTES: Final = ValueRoot.STRUCT.size + EXTENT_LIST_HEADER_BYTES + VALUE_EXTENTS * RECORD_BYTES
_ENTRIES_OFFSET: Final = ATTRIBUTES_OFFSET + AttributesHeader.STRUCT.size
_ENTRY_BYTES: Final = AttributeEntry.STRUCT.size
_ZERO_BLOCKS: Final = 256


class Attribute(NamedTuple):
    """One entry of an attribute block, whose name and value lie from `start` to `end`."""

    number: int
    entry: AttributeEntry
    name: bytes
    start: int
    end: int
    root: int | None
    """Where the root of a value outside is."""


def attributes_in(block: bytearray) -> Iterator[Attribute]:
    """The entries of an attribute block that has no index; ValueError, with a reason."""
    count = AttributesHeader.read(block).count
    if count > (BLOCK_BYTES - _ENTRIES_OFFSET) // _ENTRY_BYTES:
        raise ValueError(f"it claims {count} attributes in a block")
    for number in range(count):
        entry = AttributeEntry.read(block, _ENTRIES_OFFSET + number * _ENTRY_BYTES)
        start = ATTRIBUTES_OFFSET + entry.name_offset
        value = start + _rounded(entry.name_bytes)
        outside = not entry.kind & ATTRIBUTE_LOCAL
        end = value + (_ROOT_BYTES if outside else _rounded(min(entry.value_bytes, BLOCK_BYTES)))
        if end > BLOCK_BYTES:
            raise ValueError(f"an attribute is said to be at {start} to {end} of its block")
        name = bytes(block[start : start + entry.name_bytes])
        yield Attribute(number, entry, name, start, end, value if outside else None)


class Attributes:
    """Those of the inodes of one mount."""

    def __init__(
        self,
        device: BlockDevice,
        transactions: Transactions,
        extents: Extents,
        space: Space,
        fs_generation: int,
        uuid_hash: int,
    ) -> None:
        self._device = device
        self._transactions = transactions
        self._extents = extents
        self._space = space
        self._fs_generation = fs_generation
        self._uuid_hash = uuid_hash

    # Reading

    def value(self, inode: Ocfs2Inode) -> Value | None:
        """The blocks of our attribute, if the inode has it."""
        if not inode.attribute_block:
            return None
        buffer = self._block(inode)
        if AttributeBlock.read(buffer.data).flags & ATTRIBUTES_INDEXED:
            return None
        for attribute in self._all(inode, buffer):
            if attribute.name == NAME and attribute.entry.kind == ATTRIBUTE_TRUSTED:
                return self._outside(inode, buffer, attribute)
        return None

    def block(self, inode: Ocfs2Inode, number: int) -> Buffer | None:
        """Block `number` of the value, if there is one."""
        value = self.value(inode)
        if value is None or number >= value.clusters:
            return None
        return self._transactions.get(self._extents.map(value, number, 1)[0], inode.ino)

    def _block(self, inode: Ocfs2Inode) -> Buffer:
        buffer = self._transactions.get(inode.attribute_block, inode.ino)
        head = AttributeBlock.read(buffer.data)
        if (
            head.signature != ATTRIBUTE_BLOCK_SIGNATURE
            or head.block != inode.attribute_block
            or head.fs_generation != self._fs_generation
        ):
            raise corrupt(
                f"inode {inode.ino}: block {inode.attribute_block} is no block of attributes"
            )
        return buffer

    def _all(self, inode: Ocfs2Inode, buffer: Buffer) -> list[Attribute]:
        try:
            return list(attributes_in(buffer.data))
        except ValueError as reason:
            raise corrupt(f"inode {inode.ino}: {reason}") from None

    @staticmethod
    def _outside(inode: Ocfs2Inode, buffer: Buffer, attribute: Attribute) -> Value | None:
        if attribute.root is None:
            return None
        clusters = ValueRoot.read(buffer.data, attribute.root).clusters
        return Value(inode.ino, buffer.block, attribute.root, clusters)

    # Growing

    def extend(self, inode: Ocfs2Inode, clusters: int) -> None:
        """Our attribute has that many clusters at least, unless others left it no room. ENOSPC."""
        value = self.value(inode)
        count = clusters - (value.clusters if value is not None else 0)
        if count <= 0:
            return
        self._transactions.touch(inode)
        if value is None:
            value = self._add(inode, clusters)
            if value is None:
                return
        self._space.extend(value, count, self._zero)
        self._set_size(inode, value)

    def _zero(self, block: int, count: int) -> None:
        for start in range(block, block + count, _ZERO_BLOCKS):
            step = min(_ZERO_BLOCKS, block + count - start)
            self._device.write(start, step, bytes(step * BLOCK_BYTES))

    def _add(self, inode: Ocfs2Inode, clusters: int) -> Value | None:
        """An entry for our attribute, whose value has no cluster yet (I1 is the caller's)."""
        buffer = self._block(inode) if inode.attribute_block else self._make_block(inode)
        if AttributeBlock.read(buffer.data).flags & ATTRIBUTES_INDEXED:
            return None
        header = AttributesHeader.read(buffer.data)
        used = [attribute.entry.name_offset for attribute in self._all(inode, buffer)]
        end = min(used, default=BLOCK_BYTES - ATTRIBUTES_OFFSET)
        start = end - _rounded(len(NAME)) - _ROOT_BYTES
        at = _ENTRIES_OFFSET + header.count * _ENTRY_BYTES
        if at + _ENTRY_BYTES + ATTRIBUTE_GAP_BYTES > ATTRIBUTES_OFFSET + start:
            return None
        self._transactions.modify(buffer)
        AttributeEntry(
            name_hash(self._uuid_hash, NAME), start, len(NAME), ATTRIBUTE_TRUSTED,
            clusters * BLOCK_BYTES,
        ).write_into(buffer.data, at)  # fmt: skip
        header.count += 1
        header.write_into(buffer.data)
        name = ATTRIBUTES_OFFSET + start
        buffer.data[name : ATTRIBUTES_OFFSET + end] = bytes(end - start)
        buffer.data[name : name + len(NAME)] = NAME
        value = Value(inode.ino, buffer.block, name + _rounded(len(NAME)), 0)
        ExtentListHeader(count=VALUE_EXTENTS).write_into(buffer.data, value.list_offset)
        return value

    def _make_block(self, inode: Ocfs2Inode) -> Buffer:
        block, slot, bit = self._space.allocate_node()
        buffer = self._transactions.create(block, inode.ino)
        AttributeBlock(
            suballoc_slot=slot, suballoc_bit=bit, fs_generation=self._fs_generation, block=block
        ).write_into(buffer.data)
        AttributesHeader().write_into(buffer.data)
        inode.attribute_block = block
        inode.dyn_features |= DynFeature.HAS_XATTR
        return buffer

    def _set_size(self, inode: Ocfs2Inode, value: Value) -> None:
        buffer = self._block(inode)
        for attribute in self._all(inode, buffer):
            if attribute.root == value.offset:
                self._transactions.modify(buffer)
                attribute.entry.value_bytes = value.clusters * BLOCK_BYTES
                attribute.entry.write_into(
                    buffer.data, _ENTRIES_OFFSET + attribute.number * _ENTRY_BYTES
                )

    # Shrinking

    def cut(self, inode: Ocfs2Inode, clusters: int) -> bool:
        """Free our attribute's blocks from `clusters` on, in a bounded step; True when all are
        gone. Without any the attribute is gone, too."""
        value = self.value(inode)
        if value is None or value.clusters <= clusters:
            return True
        self._transactions.touch(inode)
        self._cut(inode, value, max(clusters, value.clusters - CUT_BLOCKS_MAX))
        return value.clusters <= clusters

    def _cut(self, inode: Ocfs2Inode, value: Value, clusters: int) -> None:
        self._space.cut(value, clusters, CUT_RECORDS_MAX)
        if value.clusters:
            self._set_size(inode, value)
        else:
            self._remove(inode, value)

    def free(self, inode: Ocfs2Inode) -> bool:
        """Free all attributes of an inode that goes, in bounded steps; True when none is left."""
        if not inode.attribute_block:
            return True
        self._transactions.touch(inode)
        buffer = self._block(inode)
        if AttributeBlock.read(buffer.data).flags & ATTRIBUTES_INDEXED:
            raise corrupt(f"inode {inode.ino} has an index of attributes; remove it with Linux")
        for attribute in self._all(inode, buffer):
            value = self._outside(inode, buffer, attribute)
            if value is not None:
                self._cut(inode, value, max(0, value.clusters - CUT_BLOCKS_MAX))
                return not inode.attribute_block
        self._free_block(inode, buffer)
        return True

    def _remove(self, inode: Ocfs2Inode, value: Value) -> None:
        """The entry of a value that has no cluster left, and the block with the last one."""
        buffer = self._block(inode)
        header = AttributesHeader.read(buffer.data)
        number = next(one.number for one in self._all(inode, buffer) if one.root == value.offset)
        if header.count == 1:
            self._free_block(inode, buffer)
            return
        self._transactions.modify(buffer)
        header.count -= 1
        header.write_into(buffer.data)
        at, end = (_ENTRIES_OFFSET + n * _ENTRY_BYTES for n in (number, header.count))
        buffer.data[at:end] = buffer.data[at + _ENTRY_BYTES : end + _ENTRY_BYTES]
        buffer.data[end : end + _ENTRY_BYTES] = bytes(_ENTRY_BYTES)

    def _free_block(self, inode: Ocfs2Inode, buffer: Buffer) -> None:
        head = AttributeBlock.read(buffer.data)
        self._space.free_node(buffer.block, head.suballoc_slot, head.suballoc_bit)
        inode.attribute_block = 0
        inode.dyn_features &= ~DynFeature.HAS_XATTR


def _rounded(count: int) -> int:
    """Names and values begin at multiples of 4."""
    return (count + 3) & ~3
