"""Nodes that mount one real OCFS2 volume and share one pool, in one process, by random histories.

What `shared_worlds` models is real here: file system, lock values, downconvert, page cache, shared
cleancache, hypervisor.  The lock table stands in for the lock manager; it keeps its promises about
values: zeros at first, and a value whose last byte is set outlives its holders.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from fs.block.file import FileDevice
from fs.dlm.modes import Mode
from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.fsck.checker import check as check_volume
from fs.ocfs2.locking import VALUE_BYTES
from fs.ocfs2.mkfs import Parameters, blocks_needed, make_volume
from guests.attachment import RETRY_SECONDS, Attachment
from guests.memory import FRAMES_MIN, TRANSFER_PAGES, Budget, Memory
from guests.pagecache import PageCache
from guests.sharedcache import SharedCleancache
from guests.verification import Verification
from hypervisor.auth import Role
from ipc.channel import Channel
from ipc.errors import Disconnected
from ipc.local import Fault
from tests.t3_fs.ocfs2 import nodes
from tests.t4_guest.shared_worlds import PAGE, SharedHypervisor

UUID = b"sixteen bytes id"
FILES = 3
FILE_PAGES = 4
NODES = 3
STEPS = 600
SEEDS = 6


class NewWorld(Protocol):
    """Makes a world of a seed."""

    def __call__(self, seed: int, *, verify: bool = False) -> World:
        """On a fresh volume."""
        ...


class Locks(nodes.TableLocks):
    """With the lock manager's promises about values."""

    def value(self, name: bytes) -> bytes | None:
        """Zeros until somebody wrote one."""
        return self._table.values.get(name, bytes(VALUE_BYTES))

    def set_value(self, name: bytes, value: bytes) -> None:
        """In EX only."""
        if self._table.holds[name][self._node] != Mode.EX:
            raise ValueError("not in EX")
        super().set_value(name, value)

    def drop(self, name: bytes) -> None:
        """A value that warns stays."""
        value = self._table.values.get(name)
        super().drop(name)
        if value is not None and value[-1]:
            self._table.values[name] = value


class Member:
    """What is outside of a mounted node: its way to the hypervisor."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.may_attach = True
        self.stumbles = False
        self._world = world

    def draw_fault(self) -> Fault:
        """The hypervisor is reached or it is not."""
        return Fault.LOSE_REQUEST if self.stumbles else Fault.NONE

    def stand_still(self) -> None:
        """Nothing happens in the middle of a call."""

    def connect(self) -> Channel:
        """As `ipc.attach.connect`."""
        if not self.may_attach:
            raise Disconnected("no way")
        return self._world.hypervisor.attach(self)  # type: ignore[arg-type]


class World:
    """Volume, nodes, hypervisor, and what every page must hold."""

    def __init__(self, path: Path, seed: int, *, verify: bool = False) -> None:
        self.random = random.Random(seed)
        self.verifications: list[Verification] = []
        """With `verify` one for each node."""
        self._verify = verify
        self.seconds = 0.0
        self.hypervisor = SharedHypervisor()
        self.cluster = nodes.Cluster(path)
        self.members = [Member(self, f"node{number}") for number in range(NODES)]
        self.caches: list[SharedCleancache] = []
        for member in self.members:
            self.hypervisor.grants.allow(UUID, member.name, Role.WRITER)
        self.nodes = [self._join(number) for number in range(NODES)]
        self.written = {
            (file, page): bytes(PAGE) for file in range(FILES) for page in range(FILE_PAGES)
        }
        for file in range(FILES):
            vfs = self.nodes[0].vfs
            handle = vfs.open(f"/{file}", os.O_CREAT | os.O_WRONLY)
            vfs.write(handle, bytes(FILE_PAGES * PAGE))
            vfs.close(handle)

    def _join(self, number: int) -> nodes.Node:
        member = self.members[number]

        def pages(fs: Ocfs2) -> PageCache:
            cache = SharedCleancache(
                Attachment(member.connect, lambda: self.seconds),
                UUID,
                lambda key: fs.token_of(key) or None,
            )
            self.caches.append(cache)
            budget = Budget(FRAMES_MIN + TRANSFER_PAGES, FRAMES_MIN, TRANSFER_PAGES, 0, 0)
            verification = None
            if fs.checksums is not None:
                verification = Verification(fs.checksums, cache.refuse_page, lambda: self.seconds)
                self.verifications.append(verification)
            made = PageCache(fs, Memory(budget), cache, cache, verification)
            fs.attach_pages(made)
            return made

        return self.cluster.join(
            number,
            pages,
            keep_checksums=self._verify,
            random_bytes=random.Random(number).randbytes,
        )

    def step(self) -> None:
        """One thing that happens."""
        chance = self.random
        number = chance.randrange(NODES)
        node, member = self.nodes[number], self.members[number]
        file, page = chance.randrange(FILES), chance.randrange(FILE_PAGES)
        what = chance.random()
        self.seconds += chance.choice((0.0, 0.1, RETRY_SECONDS))
        if what < 0.45:
            handle = node.vfs.open(f"/{file}")
            found = node.vfs.pread(handle, PAGE, page * PAGE)
            node.vfs.close(handle)
            assert found == self.written[file, page], f"node {number} read {file}/{page}"
        elif what < 0.75:
            content = chance.randbytes(16) * (PAGE // 16)
            handle = node.vfs.open(f"/{file}", os.O_WRONLY)
            node.vfs.pwrite(handle, content, page * PAGE)
            if chance.random() < 0.2:
                node.vfs.fsync(handle)
            node.vfs.close(handle)
            self.written[file, page] = content
        elif what < 0.78:
            self.hypervisor.drop_pages(chance.randrange(1, 8))
        elif what < 0.83:
            member.stumbles = not member.stumbles and chance.random() < 0.5
        elif what < 0.88:
            member.may_attach = chance.random() < 0.7
        elif not self.hypervisor.is_up:
            self.hypervisor.boot()
        elif what > 0.99:
            self.hypervisor.kill()

    def end(self) -> None:
        """Everybody unmounts."""
        for node in self.nodes:
            self.cluster.leave(node)


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """A history may meet the end of an attachment, or not."""
    loggers = [
        logging.getLogger(f"guests.{name}") for name in ("attachment", "cleancache", "sharedcache")
    ]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    yield
    for logger in loggers:
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def new_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewWorld]:
    """Makes worlds, each on a fresh volume."""
    monkeypatch.setattr(nodes, "TableLocks", Locks)
    worlds: list[World] = []

    def make(seed: int, *, verify: bool = False) -> World:
        path = tmp_path / f"{seed}-{verify}.img"
        parameters = Parameters(slots=NODES, uuid=UUID, generation=1, now_s=1, attributes=verify)
        with path.open("xb") as file:
            file.truncate((blocks_needed(parameters) + 512) * PAGE)
        device = FileDevice(path)
        make_volume(device, parameters, fresh=True)
        device.close()
        worlds.append(World(path, seed, verify=verify))
        return worlds[-1]

    yield make
    for world in worlds:
        for node in world.nodes:
            node.device.close()


@pytest.mark.parametrize("number", range(SEEDS))
def test_no_read_is_old(number: int, new_world: NewWorld) -> None:
    """Whoever reaches the hypervisor when, and whoever does not."""
    seed = random.SystemRandom().randrange(1 << 30) // SEEDS * SEEDS + number
    world = new_world(seed)
    try:
        for _ in range(STEPS):
            world.step()
        world.end()
    except AssertionError as error:
        raise AssertionError(f"World seed {seed}: {error}") from error
    device = FileDevice(world.cluster.path, read_only=True)
    assert check_volume(device) == []
    device.close()
    counts = [cache.counters() for cache in world.caches]
    assert any(count["puts"] for count in counts), f"World seed {seed}"


def test_histories_meet_what_they_are_for(new_world: NewWorld) -> None:
    """Hits, debts that went with a lock, and files that were distrusted."""
    sums = dict.fromkeys(("succ_gets", "handed_over", "distrusted"), 0)
    for seed in range(4):
        world = new_world(seed)
        for _ in range(STEPS):
            world.step()
        for cache in world.caches:
            for key in sums:
                sums[key] += cache.counters()[key]
    assert all(sums.values()), sums


def test_each_part_is_needed(new_world: NewWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without distrust some history reads an old page."""
    monkeypatch.setattr(PageCache, "distrust", lambda *_: None)
    for seed in range(40):
        world = new_world(seed)
        try:
            for _ in range(STEPS):
                world.step()
        except AssertionError as error:
            found = str(error)
            break
    else:
        found = "nothing was found in 40 histories"
    assert found.startswith("node")


def test_number_of_an_orphan_of_a_dead_node(new_world: NewWorld) -> None:
    """Whoever frees the orphan has distrusted it; then its number is another file's."""
    world = new_world(1)
    survivor, dead, _ = world.nodes
    handle = dead.vfs.open("/0", os.O_RDWR)
    number = dead.vfs.fstat(handle).st_ino
    dead.vfs.unlink("/0")
    dead.vfs.pwrite(handle, b"the last one", 0)
    dead.vfs.sync()
    dead.device.cut = True
    world.cluster.table.bury(dead, survivor)
    survivor.vfs.sync()
    # As at a node that looks for a free number for the first time.
    for allocator in survivor.fs._volume.space._allocators.values():
        allocator._places.clear()
    handle = survivor.vfs.open("/new", os.O_CREAT | os.O_RDWR)
    assert survivor.vfs.fstat(handle).st_ino == number
    survivor.vfs.pwrite(handle, b"new", 0)
    assert survivor.vfs.pread(handle, 100, 0) == b"new"
    survivor.vfs.close(handle)
