"""Wrong pages in a pool that nodes share: what a node does that verifies, and one that does not.

The nodes, their volume and the hypervisor are real (`test_shared_volume`); an attacker is a node
that puts what it likes under a lock and a token that it has by right.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from fs.block.device import BLOCK_BYTES
from fs.hooks import FileKey
from fs.ocfs2.checksums import Capacity
from fs.ocfs2.dinode import FileChecksums
from fs.ocfs2.filesystem import Ocfs2
from fs.vfs import Vfs
from guests.cleancache import object_id
from guests.verification import TELL_SECONDS, Verification
from hypervisor.auth import Role
from hypervisor.pools import Client
from hypervisor.provenance import format_oid, report_words
from hypervisor.residents import Report
from tests.support.expectations import held_pages
from tests.t3_fs.ocfs2 import nodes
from tests.t4_guest import test_shared_volume
from tests.t4_guest.test_shared_volume import FILE_PAGES, FILES, UUID, NewWorld, World

new_world = test_shared_volume.new_world
silent = test_shared_volume.silent
PAGE = BLOCK_BYTES
POISON = (b"poison " * PAGE)[:PAGE]
STEPS = 400


@pytest.fixture(params=["inside", "outside"])
def world(
    new_world: NewWorld, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> World:
    """Three nodes that verify; file 0 is on the disk, and in nobody's memory. Its checksums are in
    its inode's block, or outside, and there so many that memory has not all of them."""
    if request.param == "outside":
        defaults = Ocfs2.__init__.__kwdefaults__
        assert defaults is not None
        monkeypatch.setitem(defaults, "checksums_capacity", Capacity(1, 2, 2))
    world = new_world(1, verify=True)
    handle = world.nodes[0].vfs.open("/0", os.O_RDWR)
    world.nodes[0].vfs.pwrite(handle, right(), 0)
    world.nodes[0].vfs.close(handle)
    forget(world)
    return world


def right() -> bytes:
    """What file 0 holds."""
    return random.Random(9).randbytes(FILE_PAGES * PAGE)


def forget(world: World) -> None:
    """Another node takes the file's lock in EX and gives it up: its pages are with tmem only."""
    for node in (world.nodes[0], world.nodes[2]):
        inode = node.fs.iget(node.vfs.stat("/0").st_ino)
        with node.fs.writing(inode):
            pass


def read(vfs: Vfs, path: str = "/0") -> bytes:
    """A whole file."""
    handle = vfs.open(path)
    try:
        return vfs.pread(handle, 1 << 20, 0)
    finally:
        vfs.close(handle)


def poison(world: World, attacker: int, index: int, page: bytes = POISON, name: str = "/0") -> None:
    """Put a page under another's name, by a node that may read the file."""
    node, cache = world.nodes[attacker], world.caches[attacker]
    inode = node.fs.iget(node.vfs.stat(name).st_ino)
    with node.fs.reading(inode):
        cache.put_pages(inode.key, index, 1, memoryview(page))
        assert held(world, inode.key, index) == page


def held(world: World, key: FileKey, index: int) -> bytes | None:
    """What the pool has of a page."""
    machine = world.hypervisor.machine
    pages = held_pages(machine.memberships.shared[UUID], machine)
    return pages.get((int.from_bytes(object_id(key), "little"), index))


def key_of(node: nodes.Node, path: str = "/0") -> FileKey:
    """Of a file."""
    return node.fs.iget(node.vfs.stat(path).st_ino).key


def test_a_poisoned_page_is_a_miss(world: World, expect_warning: Callable[[str], None]) -> None:
    """It comes from the disk instead, is counted and told, and is out of the pool for everybody."""
    expect_warning("event=mismatch ino=[0-9]+ generation=[0-9]+ page=1 ")
    poison(world, 1, 1)
    victim = world.nodes[0]
    assert read(victim.vfs) == right()
    assert world.verifications[0].mismatches == 1
    assert held(world, key_of(victim), 1) is None
    assert read(world.nodes[2].vfs) == right()
    assert world.verifications[2].mismatches == 0
    assert world.verifications[2].verified == FILE_PAGES - 1


@pytest.mark.parametrize("role", list(Role))
def test_the_hypervisor_is_told_while_it_knows_who(
    world: World, expect_warning: Callable[[str], None], role: Role
) -> None:
    """Before the page is flushed.  A reader can't flush and reports each time that it gets it."""
    expect_warning("event=mismatch")
    machine = world.hypervisor.machine
    heard = []

    def hear(client: Client, report: Report) -> None:
        heard.append((client.name, report_words(machine, report)))

    machine.hear = hear
    poison(world, 1, 1)
    world.hypervisor.grants.allow(UUID, "node0", role)
    world.caches[0].reader = role is Role.READER
    key = key_of(world.nodes[0])
    assert read(world.nodes[0].vfs) == right()
    ((guest, words),) = heard
    assert (guest, words["put_by"], words["page"]) == ("node0", "node1", "there")
    assert (words["object"], words["index"]) == (format_oid(object_id(key)), 1)
    assert held(world, key, 1) == (POISON if role is Role.READER else None)
    assert world.caches[0].counters()["reported"] == 1


def test_without_checking_the_victim_reads_the_poison(world: World) -> None:
    """So the attack works, and it is verification that stops it."""
    poison(world, 1, 1)
    world.verifications[0].checking = False
    wanted = right()
    assert read(world.nodes[0].vfs) == wanted[:PAGE] + POISON + wanted[2 * PAGE :]
    assert world.verifications[0].counters() == {
        "checking": False, "verified": 0, "mismatches": 0, "unknown": 0,
    }  # fmt: skip


def test_an_old_page_is_a_wrong_page(world: World, expect_warning: Callable[[str], None]) -> None:
    """Put by a member that kept it, after another node had changed the file."""
    expect_warning("event=mismatch")
    old = right()
    writer = world.nodes[2]
    handle = writer.vfs.open("/0", os.O_RDWR)
    writer.vfs.pwrite(handle, b"new", 2 * PAGE + 5)
    writer.vfs.close(handle)
    new = read(writer.vfs)
    assert new != old
    poison(world, 1, 2, old[2 * PAGE : 3 * PAGE])
    assert read(world.nodes[0].vfs) == new
    assert world.verifications[0].mismatches == 1


def test_pages_of_the_file_that_had_the_number_before(
    world: World, expect_warning: Callable[[str], None]
) -> None:
    """They are no pages of the next one, also where their bytes were right once."""
    expect_warning("event=mismatch")
    maker, victim = world.nodes[0], world.nodes[2]
    before = key_of(maker)
    maker.vfs.unlink("/0")
    maker.vfs.sync()
    for allocator in maker.fs._volume.space._allocators.values():
        allocator._places.clear()
    handle = maker.vfs.open("/next", os.O_CREAT | os.O_RDWR)
    assert key_of(maker, "/next").ino == before.ino
    assert key_of(maker, "/next").generation != before.generation
    maker.vfs.pwrite(handle, b"n" * 2 * PAGE, 0)
    maker.vfs.close(handle)
    for index in range(2):
        poison(world, 1, index, right()[index * PAGE : (index + 1) * PAGE], "/next")
    assert read(victim.vfs, "/next") == b"n" * 2 * PAGE
    assert world.verifications[2].mismatches == 2


def test_what_has_no_checksum_is_not_asked_for(world: World) -> None:
    """Not believed at its first read; known after that, and then verified."""
    victim, verification, cache = world.nodes[0], world.verifications[0], world.caches[0]
    checksums = victim.fs.checksums
    assert checksums is not None
    inode = victim.fs.iget(victim.vfs.stat("/0").st_ino)
    with victim.fs.reading(inode):
        # As of a file that Linux wrote.
        inode.checksums = FileChecksums(bytes(16), 0)
    poison(world, 1, 0)
    asked = cache.succ_gets + cache.failed_gets
    assert read(victim.vfs) == right()
    assert cache.succ_gets + cache.failed_gets == asked
    assert verification.unknown >= FILE_PAGES
    assert verification.mismatches == 0
    with victim.fs.reading(inode):
        assert checksums.known(inode, 0, FILE_PAGES) == (1 << FILE_PAGES) - 1


def test_a_change_in_place_is_voided_on_the_disk_first(world: World) -> None:
    """Also the one that a truncate makes in the page that it cuts; not what is added."""
    node = world.nodes[0]
    checksums = node.fs.checksums
    assert checksums is not None
    handle = node.vfs.open("/0", os.O_RDWR)
    voids = []
    for change in (
        lambda: node.vfs.pwrite(handle, b"in place", PAGE),
        lambda: node.vfs.truncate("/0", 3 * PAGE - 10),
        lambda: node.vfs.pwrite(handle, b"longer", 3 * PAGE - 10),
        lambda: node.vfs.truncate("/0", PAGE),
    ):
        before = checksums.voids
        change()
        node.vfs.sync()
        voids.append(checksums.voids - before)
    node.vfs.close(handle)
    assert voids == [1, 1, 0, 0]


def test_a_node_learns_for_all(world: World) -> None:
    """What no node has written is read once, by one of them, and known to all after that."""
    first, learner, reader = world.nodes
    for node in (first, reader):
        checksums = node.fs.checksums
        assert checksums is not None
        inode = node.fs.iget(node.vfs.stat("/0").st_ino)
        with node.fs.writing(inode):
            inode.checksums = FileChecksums(bytes(16), 0)
            checksums.save(inode)
    assert read(learner.vfs) == right()
    assert world.verifications[1].unknown == FILE_PAGES
    assert world.verifications[1].learn(learner.vfs) == FILES
    assert read(first.vfs) == right()
    assert world.verifications[0].counters() == {
        "checking": True, "verified": FILE_PAGES, "mismatches": 0, "unknown": 0,
    }  # fmt: skip


def test_what_is_to_be_saved_is_saved_before_the_lock_goes(world: World) -> None:
    """Later it would be written under another node's lock, over what that one wrote."""
    first, other, third = world.nodes
    inode = first.fs.iget(first.vfs.stat("/0").st_ino)
    checksums = first.fs.checksums
    assert checksums is not None
    with first.fs.writing(inode):
        first.vfs.fs.sync()
        checksums.save(inode)
    handle = other.vfs.open("/0", os.O_RDWR)
    assert other.vfs.pread(handle, PAGE, 0) == right()[:PAGE]
    assert not checksums.unsaved(inode.ino)
    other.vfs.pwrite(handle, b"new", 0)
    other.vfs.close(handle)
    forget(world)
    assert read(third.vfs) == b"new" + right()[3:]
    assert world.verifications[2].mismatches == 0
    assert world.verifications[2].verified > 0


def test_one_page_without_a_checksum_among_others(world: World) -> None:
    """What the pool has of it is neither believed nor an accusation."""
    victim, verification = world.nodes[0], world.verifications[0]
    inode = victim.fs.iget(victim.vfs.stat("/0").st_ino)
    checksums = victim.fs.checksums
    assert checksums is not None
    with victim.fs.reading(inode):
        checksums._set(inode, 1, 0)
    poison(world, 1, 1)
    assert read(victim.vfs) == right()
    assert verification.counters() == {
        "checking": True, "verified": FILE_PAGES - 1, "mismatches": 0, "unknown": 1,
    }  # fmt: skip


def test_a_reader_takes_nothing_out_and_owes_nothing(
    new_world: NewWorld, expect_warning: Callable[[str], None]
) -> None:
    """It may not flush; the page it saw is refused each time, and the file is not lost to tmem."""
    expect_warning("event=mismatch")
    world = new_world(3, verify=True)
    world.hypervisor.grants.allow(UUID, "node0", Role.READER)
    world.caches[0].reader = True
    for number in (2, 0, 1):
        node = world.nodes[number]
        with node.fs.writing(node.fs.iget(node.vfs.stat("/0").st_ino)):
            pass
    poison(world, 1, 1)
    assert read(world.nodes[0].vfs) == bytes(FILE_PAGES * PAGE)
    assert world.verifications[0].mismatches == 1
    assert world.caches[0].counters()["owed_files"] == 0
    assert held(world, key_of(world.nodes[0]), 1) == POISON


def test_many_wrong_pages_are_few_lines(caplog: pytest.LogCaptureFixture, expect_warning: Callable[[str], None]) -> None:  # fmt: skip # noqa: E501
    """One a second, with the number of those that were not told."""
    expect_warning("event=mismatch")

    class Wrong:
        """Everything is known, and nothing is right."""

        def known(self, _inode: object, _index: int, count: int) -> int:
            return (1 << count) - 1

        def matches(self, _inode: object, _index: int, _page: memoryview) -> bool:
            return False

    class File:
        size = 64 * PAGE
        key = FileKey(5, 6)

    clock = [0.0]
    flushed: list[tuple[FileKey, int]] = []
    verification = Verification(
        Wrong(),  # type: ignore[arg-type]
        lambda key, index: flushed.append((key, index)),
        lambda: clock[0],
    )

    def get(_key: FileKey, _index: int, count: int, _into: memoryview) -> int:
        return (1 << count) - 1

    pages = memoryview(bytearray(32 * PAGE))
    for clock[0] in (0.0, TELL_SECONDS / 2, TELL_SECONDS):
        assert verification.get_pages(get, File(), 7, 32, pages) == 0  # type: ignore[arg-type]
    assert verification.mismatches == len(flushed) == 96
    assert flushed[0] == (FileKey(5, 6), 7)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.rpartition("untold=")[2] for line in lines] == ["0", "63"]


def test_honest_histories_have_no_mismatch(new_world: NewWorld) -> None:
    """Hypervisors and nodes that come and go, flushes that are late: nobody is accused."""
    seed = random.SystemRandom().randrange(1 << 30)
    world = new_world(seed, verify=True)
    try:
        for _ in range(STEPS):
            world.step()
        world.end()
    except AssertionError as error:
        raise AssertionError(f"World seed {seed}: {error}") from error
    counts = [one.counters() for one in world.verifications]
    assert not any(count["mismatches"] for count in counts), f"World seed {seed}"
    assert any(count["verified"] for count in counts), f"World seed {seed}"
