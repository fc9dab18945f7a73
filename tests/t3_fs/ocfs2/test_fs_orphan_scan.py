"""Orphans that nobody freed: found by whichever node looks next, and by one only."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from fs.dlm.modes import Mode
from fs.ocfs2.locking import OPEN, VALUE_BYTES
from fs.ocfs2.orphanscan import SCAN_LOCK
from guests.orphanscanner import OrphanScanner
from tests.support.ocfs2 import Volume, write
from tests.t3_fs.ocfs2.nodes import Cluster, Node

BLOCKS = 10


@pytest.fixture
def nodes(volume: Volume) -> Iterator[tuple[Node, Node]]:
    """Two nodes of one cluster."""
    cluster = Cluster(volume.path)
    pair = cluster.join(3), cluster.join(7)
    yield pair
    for node in pair:
        cluster.leave(node)


def leave_orphan(one: Node, two: Node, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One node removes a file and the other closes it, and each thinks that the other has it open:
    the unlock of the open lock is under way."""
    write(one.vfs, path, b"x" * BLOCKS * 4096)
    handle = two.vfs.open(path)
    for node in (one, two):
        plain = node.locks.try_acquire

        def late(name: bytes, mode: Mode, *, wait: bool = False, plain: object = plain) -> bool:
            if name.startswith(OPEN) and mode == Mode.EX:
                return False
            return plain(name, mode, wait=wait)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(node.locks, "try_acquire", late)
    one.vfs.unlink(path)
    two.vfs.close(handle)
    monkeypatch.undo()


def scan(node: Node) -> int:
    """A whole scan; how many it freed."""
    freed, in_use = 0, node.locks.in_use
    for freed in node.fs.scan_orphans():  # noqa: B007
        assert node.locks.in_use == in_use, "between two orphans nothing is held"
    return freed


@pytest.mark.parametrize("scanner", [0, 1])
def test_orphan_that_each_left_to_the_other_is_freed(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch, scanner: int
) -> None:
    """Whoever looks, and whose slot it lies in."""
    free = nodes[0].vfs.statfs().blocks_free
    leave_orphan(*nodes, "/f", monkeypatch)
    assert nodes[0].vfs.statfs().blocks_free == free - BLOCKS

    assert scan(nodes[scanner]) == 1

    assert nodes[0].vfs.statfs().blocks_free == free


def test_open_orphan_stays(nodes: tuple[Node, Node]) -> None:
    """Its data too."""
    one, two = nodes
    write(one.vfs, "/f", b"x" * 4096)
    handle = two.vfs.open("/f")
    one.vfs.unlink("/f")
    assert scan(one) == scan(two) == scan(two) == 0
    assert two.vfs.pread(handle, 3, 0) == b"xxx"
    two.vfs.close(handle)


def test_nodes_take_turns(nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch) -> None:
    """A node lets one time pass after another has scanned."""
    one, two = nodes
    assert scan(one) == 0
    leave_orphan(one, two, "/f", monkeypatch)
    assert scan(two) == 0  # it hears only now that there was a scan
    assert scan(two) == 1
    leave_orphan(one, two, "/f", monkeypatch)
    assert scan(one) == 0
    assert scan(one) == 1


def test_count_that_died_with_its_owner_does_not_end_the_scans(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one that makes no sense."""
    one, two = nodes
    leave_orphan(one, two, "/f", monkeypatch)
    one.locks._table.values[SCAN_LOCK] = None
    assert scan(two) == 1
    leave_orphan(one, two, "/f", monkeypatch)
    one.locks._table.values[SCAN_LOCK] = b"\x09" * VALUE_BYTES  # of another version
    assert scan(one) == 1


def test_scanner_scans_at_its_time_and_one_orphan_at_a_step(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is drawn anew for each scan."""
    one, two = nodes
    for number in range(3):
        leave_orphan(one, two, f"/{number}", monkeypatch)
    free = one.vfs.statfs().blocks_free
    scanner = OrphanScanner(6000, lambda count: b"\x63" + bytes(count - 1))
    for now_ns in (10_000, 16_098):
        scanner.step(one.fs, now_ns)
        assert one.vfs.statfs().blocks_free == free
    for done in range(1, 4):
        scanner.step(one.fs, 16_099)
        assert scanner.freed == done
        assert one.vfs.statfs().blocks_free == free + done * BLOCKS
    leave_orphan(one, two, "/4", monkeypatch)
    for now_ns in (16_099, 22_197):
        scanner.step(one.fs, now_ns)
    assert scanner.freed == 3
    scanner.step(one.fs, 22_198)
    assert scanner.freed == 4


def test_failed_scan_is_begun_anew(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails once."""
    one, two = nodes
    leave_orphan(one, two, "/f", monkeypatch)
    scanner = OrphanScanner(6000, bytes)
    scanner.step(one.fs, 0)
    with monkeypatch.context() as patch:
        patch.setattr(one.locks, "acquire", lambda *_: os.read(-1, 1))
        with pytest.raises(OSError, match="descriptor"):
            scanner.step(one.fs, 6000)
    scanner.step(one.fs, 12_000)
    assert scanner.freed == 1
