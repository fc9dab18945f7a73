"""The heartbeat sector: bit for bit as o2hb writes it, and as debugfs.ocfs2 reads it."""

from __future__ import annotations

import dataclasses
import random
import struct
import subprocess
from pathlib import Path

import pytest

from fs.cluster.region import (
    MAGIC,
    SECTOR_BYTES,
    Beat,
    Region,
    bitmap,
    bits,
    checksum,
    decode,
    encode,
)
from fs.cluster.view import MAX_EPOCH
from tests.support.tools import need_tool

FEATURES_OFF = (
    "inline-data,indexed-dirs,refcount,discontig-bg,xattr,append-dio,backup-super,sparse,unwritten"
)
MKFS = [
    *("-q", "-M", "cluster", "-N", "2", "-b", "4K", "-C", "4K", "-J", "size=4M"),
    "--fs-features=" + ",".join(f"no{name}" for name in FEATURES_OFF.split(",")),
]


class Memory:
    """Sectors in memory, or in the file that `data` was read from."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    def read_sectors(self, sector: int, count: int) -> bytes:
        return bytes(self.data[sector * SECTOR_BYTES : (sector + count) * SECTOR_BYTES])

    def write_sector(self, sector: int, data: bytes) -> None:
        self.data[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES] = data


def slow_crc32_le(data: bytes) -> int:
    """Linux's crc32_le(0, ...) by its definition: no inversion before or after."""
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
    return value


def test_the_sector_has_o2hb_s_fields_at_their_places() -> None:
    """And our two behind them."""
    sector = encode(Beat(0x1122334455667788, 7, 0xA1B2C3D4E5F60718, 62_000, 9, frozenset({0, 8})))
    assert len(sector) == SECTOR_BYTES
    assert struct.unpack_from("<QB3x", sector) == (0x1122334455667788, 7)
    assert struct.unpack_from("<QI", sector, 16) == (0xA1B2C3D4E5F60718, 62_000)
    assert sector[32:40] == MAGIC
    assert struct.unpack_from("<Q", sector, 40) == (9,)
    assert sector[48:80] == b"\x01\x01" + bytes(30)
    assert not any(sector[80:])


def test_the_checksum_is_o2hb_s() -> None:
    """By the definition of crc32_le, over the sector with its checksum field zero."""
    sector = encode(Beat(5, 1, 77, 1000))
    blank = sector[:12] + bytes(4) + sector[16:]
    assert struct.unpack_from("<I", sector, 12) == (slow_crc32_le(blank),)
    assert checksum(bytes(SECTOR_BYTES)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_every_changed_bit_is_noticed(seed: int) -> None:
    """A torn or rotten sector is no beat."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    old = encode(Beat(rng.getrandbits(64), 3, rng.getrandbits(64), 1400, 2, frozenset({3})))
    new = encode(Beat(rng.getrandbits(64), 3, rng.getrandbits(64), 1400, 3, frozenset({3, 4})))
    assert decode(old) is not None
    for _ in range(200):
        at = rng.randrange(SECTOR_BYTES * 8)
        broken = bytearray(old)
        broken[at // 8] ^= 1 << at % 8
        assert decode(bytes(broken)) is None
    for cut in range(1, 80):
        torn = new[:cut] + old[cut:]
        assert torn in (old, new) or decode(torn) is None


def test_a_beat_of_linux_and_an_empty_sector_are_read() -> None:
    """Nothing of ours in them: no epoch, no members."""
    linux = bytearray(SECTOR_BYTES)
    struct.pack_into("<QB3xIQI", linux, 0, 1764043823, 4, 0, 99, 62_000)
    struct.pack_into("<I", linux, 12, slow_crc32_le(bytes(linux)))
    assert decode(bytes(linux)) == Beat(1764043823, 4, 99, 62_000)
    assert decode(bytes(SECTOR_BYTES)) == Beat(0, 0, 0, 0)


def test_bitmaps() -> None:
    """All nodes, none, and the bit that is no node."""
    assert bits(bitmap(range(255))) == frozenset(range(255))
    assert bits(bitmap([])) == frozenset()
    assert bits(b"\xff" * 32) == frozenset(range(255))


def test_region_reads_all_and_writes_one() -> None:
    """Bad sectors are None, a short read is EIO."""
    memory = Memory(bytes(20 * SECTOR_BYTES))
    region = Region(memory, 4, 8)
    beat = Beat(1, 6, 2, 3)
    region.write(beat)
    memory.data[5 * SECTOR_BYTES] = 1
    assert region.read() == [
        Beat(0, 0, 0, 0), None, *[Beat(0, 0, 0, 0)] * 4, beat, Beat(0, 0, 0, 0)
    ]  # fmt: skip
    assert memory.data[10 * SECTOR_BYTES : 11 * SECTOR_BYTES] == encode(beat)
    with pytest.raises(ValueError, match="node 8"):
        region.write(Beat(1, 8, 2, 3))
    del memory.data[6 * SECTOR_BYTES :]
    with pytest.raises(OSError, match="heartbeat sectors"):
        region.read()


def test_debugfs_ocfs2_reads_what_we_write(tmp_path: Path) -> None:
    """In the file `heartbeat` of a file system that mkfs.ocfs2 made."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(
        [need_tool("mkfs.ocfs2"), *MKFS, str(image)], check=True, capture_output=True, input=b"y\n"
    )
    debugfs = need_tool("debugfs.ocfs2")

    def ask(command: str) -> str:
        run = [debugfs, "-R", command, str(image)]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout

    extent = ask("stat //heartbeat").splitlines()
    rows = [line.split() for line in extent if line.split()[:2] == ["0", "0"]]
    assert len(rows) == 1, extent
    first_sector = int(rows[0][3]) * 8
    memory = Memory(image.read_bytes())
    region = Region(memory, first_sector, 255)
    beats = [
        Beat(1000 + n, n, 0xABCDEF00 + n, 62_000, 5, frozenset({0, 1, 254})) for n in (0, 1, 254)
    ]
    for beat in beats:
        region.write(beat)
    image.write_bytes(memory.data)
    lines = [line.split() for line in ask("hb").splitlines() if ":" in line][1:]
    assert lines == [
        [
            f"{beat.node}:", str(beat.node), f"{beat.seq:016x}", f"{beat.generation:016x}",
            f"{checksum(encode(beat)):08x}", str(beat.dead_ms),
        ]
        for beat in beats
    ]  # fmt: skip


def test_a_beat_with_an_epoch_that_cannot_be_is_none() -> None:
    """Who started after it would have to go on from there."""
    beat = Beat(1, 2, 3, 4, MAX_EPOCH, frozenset({2}))
    assert decode(encode(beat)) == beat
    assert decode(encode(dataclasses.replace(beat, epoch=MAX_EPOCH + 1))) is None
