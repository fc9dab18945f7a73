"""Two shared cleancaches over real lock managers: who holds a lock gets its token lifted.

After a restart of the hypervisor the newest token of the pool is needed for every file, also for
one that nobody writes any more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from fs.dlm.locks import NodeLocks
from fs.dlm.modes import Mode
from fs.dlm.twin import Twin
from fs.hooks import FileKey
from guests.attachment import RETRY_SECONDS, Attachment
from guests.sharedcache import SharedCleancache
from hypervisor.auth import Role
from ipc.channel import Channel
from ipc.local import Fault
from tests.t4_guest.shared_worlds import PAGE, UUID, SharedHypervisor

READ_ONLY = FileKey(3, 7)
WRITTEN = FileKey(4, 7)


class Machine:
    """One node: locks and cache, wired as in `guests.kernel`."""

    def __init__(self, world: World, number: int, *, lifts: bool) -> None:
        self.name = f"node{number}"
        self.world = world
        self.asked: list[int] = []
        self.lifts = lifts
        self.locks = NodeLocks(number, world.twin.transport(number), world.pump)
        world.twin.attach(number, self.locks.manager)
        world.hypervisor.grants.allow(UUID, self.name, Role.WRITER)
        self.cache = SharedCleancache(
            Attachment(self._connect, lambda: world.seconds),
            UUID,
            lambda key: self.locks.token(lock_name(key)) or None,
            on_stale=self._lift,
        )

    def _connect(self) -> Channel:
        return self.world.hypervisor.attach(self)  # type: ignore[arg-type]

    def draw_fault(self) -> Fault:
        return Fault.NONE

    def stand_still(self) -> None:
        """Nothing happens in the middle of a call."""

    def _lift(self, key: FileKey, needed: int) -> None:
        self.asked.append(needed)
        if self.lifts:
            self.locks.lift(lock_name(key), needed)

    def lock(self, key: FileKey, mode: Mode) -> None:
        """Taken and cached."""
        self.locks.acquire(lock_name(key), mode)
        self.locks.release(lock_name(key), mode)

    def put(self, index: int) -> None:
        """A page of the file that is only read."""
        self.cache.put_pages(READ_ONLY, index, 1, memoryview(bytes([index]) * PAGE))

    def get(self, index: int) -> bool:
        """Whether the pool has that page."""
        into = bytearray(PAGE)
        found = self.cache.get_pages(READ_ONLY, index, 1, memoryview(into))
        assert not found or into == bytes([index]) * PAGE
        return bool(found)


class World:
    """Two nodes."""

    def __init__(self, *, lifts: bool) -> None:
        self.seconds = 0.0
        self.hypervisor = SharedHypervisor()
        self.twin = Twin()
        self.machines = [Machine(self, number, lifts=lifts) for number in range(2)]
        for machine in self.machines:
            machine.locks.manager.set_view(1, frozenset(range(2)))
        self.pump()

    def pump(self) -> None:
        """Everything arrives."""
        while links := self.twin.ready():
            self.twin.arrive(links[0])
        for machine in self.machines:
            if machine.locks.uses == 0:
                machine.locks.serve()


def lock_name(key: FileKey) -> bytes:
    """As OCFS2 has it."""
    return b"M%022x%08x" % (key.ino, key.generation)


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """Attachments end here."""
    logger = logging.getLogger("guests.attachment")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("lifts", [True, False])
def test_read_only_files_are_shared_again_after_a_restart(*, lifts: bool) -> None:
    """Without a write; and not if nothing is lifted, which is the test of the test."""
    world = World(lifts=lifts)
    a, b = world.machines
    for machine in (a, b):
        machine.lock(READ_ONLY, Mode.PR)
    for number in range(6):
        machine = world.machines[number % 2]
        machine.lock(WRITTEN, Mode.EX)
        machine.cache.flush_inode(WRITTEN)
    newest = max(machine.locks.token(lock_name(WRITTEN)) for machine in (a, b))
    a.put(1)
    assert b.get(1)
    world.hypervisor.kill()
    a.put(2)
    b.put(2)
    world.hypervisor.boot()
    world.seconds += RETRY_SECONDS

    a.put(3)
    assert a.asked == [newest]
    assert not b.get(3), "the page that was refused is lost"
    world.pump()
    before = b.cache.succ_gets
    for index in range(4, 12):
        a.put(index)
    found = [b.get(index) for index in range(4, 12)]
    assert found == [lifts] * 8
    assert b.cache.succ_gets - before == 8 * lifts
    if not lifts:
        return
    assert a.asked == [newest]

    # The other reader has the old token still, and asks in its turn.
    b.put(20)
    world.pump()
    b.put(21)
    assert (a.get(20), a.get(21)) == (False, True)
    assert b.locks.token(lock_name(READ_ONLY)) == a.locks.token(lock_name(READ_ONLY)) == newest
