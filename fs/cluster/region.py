"""The heartbeat area: one sector of 512 bytes for each node, inside the system file `heartbeat`.

The first 32 bytes are o2hb's block, little endian (Linux fs/ocfs2/cluster/ocfs2_heartbeat.h):
  0 seq u64 · 8 node u8 · 9 three zero bytes · 12 checksum u32 · 16 generation u64 · 24 dead_ms u32
The checksum is o2hb's (o2hb_compute_block_crc_le in heartbeat.c): crc32 of the whole sector with
the checksum field zero, started from 0 and not inverted at the end. So a sector of zeros is valid:
sequence 0, generation 0.

Behind them, where o2hb writes zeros and reads nothing, stands what this node is a member of:
  32 magic "tmemview" · 40 epoch u64 · 48 member bitmap of 32 bytes
An empty bitmap is a node that is in no view; its epoch is then the highest that it has seen. So
epochs go on growing when all nodes were away, and a starting node sees who is a member already.

Generation 0 is a node that left cleanly.
"""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Protocol

from fs.cluster.config import MAX_NODES
from fs.cluster.view import MAX_EPOCH
from fs.errors import error

SECTOR_BYTES: Final = 512
MAGIC: Final = b"tmemview"

_BLOCK: Final = struct.Struct("<QB3xIQI4x8sQ32s")
_CHECKSUM: Final = struct.Struct("<I")
_CHECKSUM_OFFSET: Final = 12
_BITMAP_BYTES: Final = 32
_ONES: Final = 0xFFFFFFFF


class SectorDevice(Protocol):
    """What the heartbeat needs of a device. Errors are `OSError`."""

    def read_sectors(self, sector: int, count: int) -> bytes:
        """The bytes of `count` sectors that start at `sector`."""
        ...

    def write_sector(self, sector: int, data: bytes) -> None:
        """Write one sector; others see it once this returned."""
        ...


@dataclass(frozen=True)
class Beat:
    """The content of a sector whose checksum is right."""

    seq: int
    node: int
    generation: int
    dead_ms: int
    epoch: int = 0
    members: frozenset[int] = frozenset()


def bitmap(nodes: Collection[int]) -> bytes:
    """Node numbers as 32 bytes, node 0 the lowest bit of the first."""
    return sum(1 << node for node in set(nodes)).to_bytes(_BITMAP_BYTES, "little")


def bits(untrusted_map: bytes) -> frozenset[int]:
    """The node numbers of a bitmap; bit 255 is no node and ignored."""
    value = int.from_bytes(untrusted_map, "little")
    return frozenset(node for node in range(MAX_NODES) if value >> node & 1)


def checksum(sector: bytes | bytearray) -> int:
    """o2hb's checksum of a sector, whatever its checksum field holds."""
    blank = bytearray(sector)
    blank[_CHECKSUM_OFFSET : _CHECKSUM_OFFSET + _CHECKSUM.size] = bytes(_CHECKSUM.size)
    return zlib.crc32(blank, _ONES) ^ _ONES


def encode(beat: Beat) -> bytes:
    """The sector of a beat."""
    sector = bytearray(SECTOR_BYTES)
    _BLOCK.pack_into(
        sector,
        0,
        beat.seq,
        beat.node,
        0,
        beat.generation,
        beat.dead_ms,
        MAGIC,
        beat.epoch,
        bitmap(beat.members),
    )
    _CHECKSUM.pack_into(sector, _CHECKSUM_OFFSET, checksum(sector))
    return bytes(sector)


def decode(untrusted_sector: bytes) -> Beat | None:
    """The beat in a sector; None when its checksum is wrong (torn, or never a heartbeat), or when
    its epoch can't be."""
    seq, node, found, generation, dead_ms, magic, epoch, members = _BLOCK.unpack_from(
        untrusted_sector
    )
    if found != checksum(untrusted_sector):
        return None
    if magic != MAGIC:
        return Beat(seq, node, generation, dead_ms)
    if epoch > MAX_EPOCH:
        return None
    return Beat(seq, node, generation, dead_ms, epoch, bits(members))


class Region:
    """The sectors of nodes `0 .. nodes-1`; the area starts at `first_sector` of the device."""

    def __init__(self, device: SectorDevice, first_sector: int, nodes: int) -> None:
        if not 0 < nodes <= MAX_NODES or first_sector < 0:
            raise ValueError(f"{nodes} nodes at sector {first_sector}")
        self.nodes = nodes
        self._device = device
        self._first_sector = first_sector

    def read(self) -> list[Beat | None]:
        """All sectors, one entry a node."""
        data = self._device.read_sectors(self._first_sector, self.nodes)
        if len(data) != self.nodes * SECTOR_BYTES:
            raise error(errno.EIO, f"{len(data)} bytes of {self.nodes} heartbeat sectors")
        return [decode(data[at : at + SECTOR_BYTES]) for at in range(0, len(data), SECTOR_BYTES)]

    def write(self, beat: Beat) -> None:
        """Write the sector of the beat's node."""
        if not 0 <= beat.node < self.nodes:
            raise ValueError(f"node {beat.node} of {self.nodes}")
        self._device.write_sector(self._first_sector + beat.node, encode(beat))
