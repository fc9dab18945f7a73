"""The journal keeps its promises to its caller."""

from __future__ import annotations

import errno
import random
import struct

import pytest

from fs.block.device import BLOCK_BYTES
from fs.block.faulty import FaultyDevice
from fs.block.memory import MemoryDevice
from fs.jbd2.area import Area
from fs.jbd2.format import INCOMPAT_64BIT, INCOMPAT_REVOKE, Superblock
from fs.jbd2.journal import Journal, format_journal
from fs.jbd2.recovery import recover, unreplayed
from tests.t3_fs.jbd2.journals import FORMS, HOME_BLOCKS, UUID, area_of, clock, new_device

BLOCKS = 24


def page(fill: str) -> bytes:
    """A block full of one letter."""
    return fill.encode() * BLOCK_BYTES


def opened(device: MemoryDevice) -> Journal:
    """The journal of such a device."""
    return Journal(area_of(device, BLOCKS), now_ns=clock)


def superblock(device: MemoryDevice) -> Superblock:
    """Its superblock."""
    return Superblock(area_of(device, BLOCKS).read(0), BLOCKS)


def test_commit_is_in_the_log_only() -> None:
    """A commit doesn't write home; the image is pending until a checkpoint."""
    device = new_device("plain")
    journal = opened(device)
    tid = journal.commit({5: page("a")})
    assert device.contents[5] == bytes(BLOCK_BYTES)
    assert journal.pending(5) == page("a")
    assert unreplayed(area_of(device, BLOCKS)) == {5: page("a")}
    assert journal.commit({5: page("b"), 6: page("c")}) == tid + 1
    journal.checkpoint()
    assert device.contents[5:7] == [page("b"), page("c")]
    assert journal.pending(5) is None
    assert superblock(device).start == 0
    assert unreplayed(area_of(device, BLOCKS)) == {}


def test_nothing_to_write_writes_nothing() -> None:
    """An empty commit, a second checkpoint and closing a clean journal leave the disk alone."""
    device = new_device("plain")
    journal = opened(device)
    tid = journal.commit({1: page("x")})
    journal.checkpoint()
    before = list(device.contents)
    assert journal.commit({}) == tid
    journal.forget(1)
    # The log holds nothing of block 1 any more: there is nothing to revoke.
    assert journal.commit({}, [2]) == tid
    journal.checkpoint()
    journal.close()
    journal.close()
    assert device.contents == before


@pytest.mark.parametrize("form", FORMS)
def test_log_wraps(form: str) -> None:
    """Many times the log's size goes through it, and every life starts where the last one ended."""
    device = new_device(form)
    rng = random.Random(form)
    expected = [bytes(BLOCK_BYTES)] * HOME_BLOCKS
    for life in range(6):
        journal = opened(device)
        assert journal.recovered.transactions == 0 or life % 2
        for _ in range(10):
            writes = {rng.randrange(HOME_BLOCKS): rng.randbytes(BLOCK_BYTES) for _ in range(5)}
            journal.commit(writes)
            for block, image in writes.items():
                expected[block] = image
        if life % 2:
            journal.close()
            assert superblock(device).start == 0
            assert device.contents[:HOME_BLOCKS] == expected
    recover(area_of(device, BLOCKS))
    assert device.contents[:HOME_BLOCKS] == expected


def test_sequence_numbers_wrap() -> None:
    """2^32 - 1 is followed by 0, in the log and in recovery."""
    device = new_device("checksum-v3")
    area = area_of(device, BLOCKS)
    old = superblock(device)
    old.sequence = 2**32 - 3
    area.write(0, old.pack())
    journal = opened(device)
    tids = [journal.commit({block: page("z")}) for block in range(3)]
    assert tids == [2**32 - 2, 2**32 - 1, 0]
    found = recover(area)
    assert (found.transactions, found.next_sequence) == (3, 2)
    assert device.contents[:3] == [page("z")] * 3


def test_forgotten_block_is_not_replayed() -> None:
    """Freed, committed, written as data: neither recovery nor checkpoint overwrites it."""
    for crash in (True, False):
        device = new_device("plain")
        journal = opened(device)
        journal.commit({3: page("m"), 4: page("n")})
        journal.forget(3)
        journal.commit({})
        assert journal.pending(3) is None
        device.write(3, 1, page("d"))
        if crash:
            found = recover(area_of(device, BLOCKS))
            assert found.revoked_blocks == 1
        else:
            journal.close()
        assert device.contents[3:5] == [page("d"), page("n")]
        assert superblock(device).incompat & INCOMPAT_REVOKE


def test_forgotten_block_that_is_used_again() -> None:
    """Freed and taken for metadata again: its newest image is replayed, in any transaction."""
    device = new_device("plain")
    journal = opened(device)
    journal.commit({3: page("a")})
    journal.forget(3)
    journal.commit({3: page("b")})
    journal.commit({}, [3])
    journal.commit({3: page("c")})
    recover(area_of(device, BLOCKS))
    assert device.contents[3] == page("c")


@pytest.mark.parametrize("ocfs2_tools", [False, True])
@pytest.mark.parametrize("form", ["plain", "checksum-v3-64bit"])
def test_many_revokes(form: str, ocfs2_tools: bool) -> None:
    """More records than a block has room for, and all of them count."""
    blocks = 4000
    device = MemoryDevice.empty(3 * blocks)
    area = Area(device, range(blocks, 2 * blocks))
    compat, incompat = FORMS[form]
    format_journal(area, UUID, compat=compat, incompat=incompat, zero=False)
    journal = Journal(area, now_ns=clock, ocfs2_tools=ocfs2_tools)
    for start in range(0, 3000, 1000):
        journal.commit({block: page("r") for block in range(start, start + 1000)})
    free = journal.free_blocks
    journal.commit({}, range(1, 3000))
    records = 4080 // 4 if form == "plain" else 4076 // 8
    assert free - journal.free_blocks == 1 + -(-2999 // (records // (1 + ocfs2_tools)))
    found = recover(area)
    assert (found.replayed_blocks, found.revoked_blocks) == (1, 2999)


def test_forgotten_but_not_committed_is_still_needed() -> None:
    """A checkpoint before the freeing is committed writes the block home."""
    device = new_device("plain")
    journal = opened(device)
    journal.commit({3: page("a")})
    journal.forget(3)
    journal.checkpoint()
    assert device.contents[3] == page("a")


def test_too_many_blocks() -> None:
    """EFBIG tells how many there may be; nothing changed, and the journal goes on."""
    device = new_device("plain")
    journal = opened(device)
    assert journal.max_transaction_blocks == BLOCKS // 4
    before = list(device.contents)
    with pytest.raises(OSError, match="the journal takes 6") as caught:
        journal.commit({block: page("x") for block in range(7)})
    assert caught.value.errno == errno.EFBIG
    assert device.contents == before
    journal.commit({block: page("x") for block in range(6)})


@pytest.mark.parametrize("block", [-1, HOME_BLOCKS, HOME_BLOCKS + BLOCKS, 1 << 40])
def test_impossible_blocks_are_refused(block: int) -> None:
    """A block outside of the device or of the journal itself is EINVAL."""
    journal = opened(new_device("plain"))
    with pytest.raises(OSError, match="for block") as caught:
        journal.commit({block: page("x")})
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("bad", ["log", "home"])
def test_error_aborts(bad: str) -> None:
    """EIO once, noted in the superblock; EROFS afterwards; the log is still replayed."""
    below = new_device("plain")
    faulty = FaultyDevice(below, random.Random(0))
    area = area_of(faulty, BLOCKS)
    journal = Journal(area, now_ns=clock)
    journal.commit({2: page("a")})
    faulty.bad_writes = {2} if bad == "home" else set(area.blocks[1:])
    with pytest.raises(OSError, match="can't be written") as caught:
        journal.checkpoint() if bad == "home" else journal.commit({1: page("b")})
    assert caught.value.errno == errno.EIO
    assert journal.is_aborted
    for again in (lambda: journal.commit({1: page("b")}), journal.checkpoint):
        with pytest.raises(OSError, match="aborted") as caught:
            again()
        assert caught.value.errno == errno.EROFS
    journal.close()
    assert below.contents[2] == bytes(BLOCK_BYTES)
    journal = opened(below)
    assert below.contents[2] == page("a")
    assert journal.recovered.error_code == journal.error_code == errno.EIO
    journal.clear_error()
    assert opened(below).error_code == 0


def test_closed_journal_refuses() -> None:
    """EROFS after close."""
    journal = opened(new_device("plain"))
    journal.close()
    with pytest.raises(OSError, match="closed") as caught:
        journal.commit({1: page("x")})
    assert caught.value.errno == errno.EROFS


def test_version_1_superblock() -> None:
    """It is read, recovered, and becomes version 2 when it is written."""
    device = new_device("plain")
    opened(device).commit({1: page("o")})
    area = area_of(device, BLOCKS)
    raw = area.read(0)
    struct.pack_into(">I", raw, 4, 3)
    raw[36:1024] = b"\xee" * 988
    area.write(0, raw)
    journal = opened(device)
    assert journal.recovered.transactions == 1
    assert device.contents[1] == page("o")
    journal.commit({1: page("p"), 2: page("q")})
    journal.commit({}, [2])
    assert superblock(device).incompat == INCOMPAT_REVOKE
    found = recover(area)
    assert (found.replayed_blocks, found.revoked_blocks) == (1, 1)


def test_reading_recovery_changes_nothing() -> None:
    """`read_only` tells; a device that can't be written is EROFS when there is something to do."""
    device = new_device("plain")
    opened(device).commit({1: page("x")})
    device.read_only = True
    before = list(device.contents)
    told = recover(area_of(device, BLOCKS), read_only=True)
    assert (told.transactions, told.replayed_blocks) == (1, 1)
    with pytest.raises(OSError, match="replayed first") as caught:
        recover(area_of(device, BLOCKS))
    assert caught.value.errno == errno.EROFS
    assert device.contents == before
    device.read_only = False
    assert recover(area_of(device, BLOCKS)) == told


def test_wide_block_numbers() -> None:
    """A block beyond 2^32 needs the feature for it."""

    class Huge(MemoryDevice):
        """Claims to have more blocks than it has."""

    for incompat in (0, INCOMPAT_64BIT):
        device = Huge.empty(BLOCKS)
        area = Area(device, range(BLOCKS))
        format_journal(area, UUID, incompat=incompat)
        device.blocks = 1 << 33
        journal = Journal(area, now_ns=clock)
        if not incompat:
            with pytest.raises(OSError, match="journal_64bit"):
                journal.commit({(1 << 32) + 5: page("x")})
        else:
            journal.commit({(1 << 32) + 5: page("x")})
            assert unreplayed(area) == {(1 << 32) + 5: page("x")}


def test_mkfs_form() -> None:
    """The superblock is what mkfs.ocfs2 writes: version 2, log from 1, started, one user."""
    device = new_device("plain", started=True)
    raw = area_of(device, BLOCKS).read(0)
    words = struct.unpack_from(">12I", raw)
    assert words == (0xC03B3998, 4, 0, BLOCK_BYTES, BLOCKS, 1, 1, 1, 0, 0, 0, 0)
    assert raw[48:64] == UUID
    assert struct.unpack_from(">I", raw, 64) == (1,)
    assert not any(raw[68:])
    assert recover(area_of(device, BLOCKS)).next_sequence == 2
    assert superblock(device).start == 0
