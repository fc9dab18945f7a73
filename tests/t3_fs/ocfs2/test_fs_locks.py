"""Locks on files between nodes: what Linux grants on one machine, whoever of them asks."""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Iterator, Sequence

import pytest

from fs.filelocks import RangeLock
from fs.hooks import FileKey
from fs.ocfs2.locking import RANGES, lock_name
from fs.vfs import Vfs
from tests.t3_fs.ocfs2.conftest import MakeVolume
from tests.t3_fs.ocfs2.nodes import Cluster, Node

STEPS = 600
NODES = (1, 2, 3)
HANDLES = 2
"""On each node."""


class LockingCluster(Cluster):
    """Nodes that answer each other's questions; `questions` counts them."""

    questions = 0

    def locking(self, number: int) -> Node:
        """One more node."""
        node = self.join(number)

        def ask(file: FileKey, nodes: frozenset[int] | None) -> Sequence[RangeLock]:
            self.questions += 1
            return [
                lock._replace(node=other.number)
                for other in self.table.nodes.values()
                if other is not node and (nodes is None or other.number in nodes)
                for lock in other.vfs.file_locks.ranges_of(*file)
            ]

        node.fs.other_nodes.ask = ask
        return node


@pytest.fixture
def cluster(make_image: MakeVolume) -> Iterator[LockingCluster]:
    """A volume for three nodes, with a file."""
    volume = make_image(slots=3)
    vfs = volume.mount()
    vfs.close(vfs.open("/f", os.O_CREAT | os.O_RDWR))
    volume.unmount()
    made = LockingCluster(volume.path)
    yield made
    for node in list(made.table.nodes.values()):
        made.leave(node)


def attempt(vfs: Vfs, name: str, *arguments: int) -> bool:
    """Whether a lock was had."""
    try:
        getattr(vfs, name)(*arguments)
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("seed", range(3))
def test_three_nodes_are_as_one(cluster: LockingCluster, vfs: Vfs, seed: int) -> None:
    """Random locks of all nodes are granted and refused as one mount with all handles does."""
    rng = random.Random(seed)
    nodes = [cluster.locking(number) for number in NODES]
    handles = [(node.vfs, node.vfs.open("/f", os.O_RDWR)) for node in nodes for _ in range(HANDLES)]
    refused = granted = 0
    referred = {pair: vfs.open("/f", os.O_RDWR | os.O_CREAT) for pair in handles}
    for step in range(STEPS):
        pair = rng.choice(handles)
        if rng.random() < 0.4:
            what: tuple[str, int, *tuple[int, ...]] = (
                "flock",
                pair[1],
                rng.choice((fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN, fcntl.LOCK_UN)),
            )
        else:
            kind = rng.choice((fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK))
            what = ("lock_range", pair[1], kind, rng.randrange(40), rng.choice((0, 1, 5, 15)))
        got = attempt(pair[0], *what)
        expected = attempt(vfs, what[0], referred[pair], *what[2:])
        assert got == expected, f"seed {seed} step {step}: {what} of {pair}"
        granted, refused = granted + got, refused + (not got)
    assert granted > 50
    assert refused > 50
    assert cluster.questions
    for mine, handle in handles:
        mine.close(handle)
    assert not any(node.vfs.file_locks.ranges() for node in nodes)


def test_a_file_of_one_node_is_not_asked_about(cluster: LockingCluster) -> None:
    """The value of the range lock says that nobody else has ranges; one who had is asked once."""
    first, second = cluster.locking(1), cluster.locking(2)
    mine = first.vfs.open("/f", os.O_RDWR)
    for start in range(20):
        first.vfs.lock_range(mine, fcntl.F_WRLCK, start, 1)
    assert cluster.questions == 0
    other = second.vfs.open("/f", os.O_RDWR)
    second.vfs.lock_range(other, fcntl.F_WRLCK, 100, 1)
    assert cluster.questions == 1
    first.vfs.close(mine)
    for start in range(5):
        second.vfs.lock_range(other, fcntl.F_WRLCK, start, 1)
    assert cluster.questions == 2
    assert second.vfs.range_in_the_way(other, fcntl.F_WRLCK, 0, 0) is None


def test_a_node_that_dies_leaves_no_lock(cluster: LockingCluster) -> None:
    """Also when it had the range lock, and its value is lost with it: then all are asked."""
    nodes = [cluster.locking(number) for number in NODES]
    handles = [node.vfs.open("/f", os.O_RDWR) for node in nodes]
    nodes[0].vfs.lock_range(handles[0], fcntl.F_WRLCK, 0, 10)
    nodes[1].vfs.lock_range(handles[1], fcntl.F_WRLCK, 20, 10)
    nodes[1].vfs.flock(handles[1], fcntl.LOCK_EX)
    assert not attempt(nodes[2].vfs, "flock", handles[2], fcntl.LOCK_SH)
    found = nodes[0].vfs.range_in_the_way(handles[0], fcntl.F_RDLCK, 5, 100)
    assert found is not None
    assert (found.start, found.end, found.exclusive, found.node) == (20, 30, True, 2)
    nodes[1].vfs.lock_range(handles[1], fcntl.F_WRLCK, 50, 1)
    cluster.kill(nodes[1])
    assert nodes[1].fs.slot is not None
    nodes[2].fs.recover_slot(nodes[1].fs.slot)
    name = lock_name(RANGES, nodes[2].vfs.inode_of(handles[2]).ino)[:23]
    lost = [key for key, value in cluster.table.values.items() if value is None]
    assert name in {key[:23] for key in lost}
    assert attempt(nodes[2].vfs, "lock_range", handles[2], fcntl.F_WRLCK, 20, 10)
    assert not attempt(nodes[2].vfs, "lock_range", handles[2], fcntl.F_RDLCK, 9, 1)
    assert attempt(nodes[2].vfs, "flock", handles[2], fcntl.LOCK_SH)


def test_locks_that_fail_leave_nothing_in_the_cluster(cluster: LockingCluster) -> None:
    """Whoever closes its last handle keeps no lock of the file but its meta lock."""
    first, second = cluster.locking(1), cluster.locking(2)
    for node, want in ((first, True), (second, False)):
        handle = node.vfs.open("/f", os.O_RDWR)
        assert attempt(node.vfs, "flock", handle, fcntl.LOCK_EX) == want
        assert attempt(node.vfs, "lock_range", handle, fcntl.F_WRLCK, 0, 0) == want
    for node in (first, second):
        node.vfs.close(3)
        assert node.locks.in_use == 0
    kept = {name[:1] for name, holders in cluster.table.holds.items() if holders}
    assert not kept & {b"F", b"L", b"O"}
