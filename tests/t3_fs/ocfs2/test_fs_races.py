"""Nodes get in each other's way at one exact moment, in one process."""

from __future__ import annotations

import os

import pytest

from fs.dlm.modes import Mode
from fs.ocfs2.locking import OPEN, lock_name
from tests.support.ocfs2 import BLOCK, Volume, write
from tests.t3_fs.ocfs2.nodes import Cluster, Node


def pair(volume: Volume) -> tuple[Cluster, Node, Node]:
    """Two nodes."""
    cluster = Cluster(volume.path)
    return cluster, cluster.join(3), cluster.join(7)


def test_orphan_of_a_dead_node_is_not_freed_while_it_is_open_here(volume: Volume) -> None:
    """Whoever takes the dead node's slot over may be the one that has the file open."""
    cluster, one, two = pair(volume)
    write(one.vfs, "/f", b"x" * 10 * BLOCK)
    one.vfs.sync()
    handle = two.vfs.open("/f", os.O_RDWR)
    free = two.vfs.statfs().blocks_free
    one.vfs.unlink("/f")
    one.vfs.sync()
    slot = one.fs.slot
    assert slot is not None
    cluster.kill(one)

    two.fs.recover_slot(slot)

    assert two.vfs.pread(handle, 3, 9 * BLOCK) == b"xxx"
    two.vfs.pwrite(handle, b"y", 0)
    assert two.vfs.statfs().blocks_free == free
    two.vfs.close(handle)
    assert two.vfs.statfs().blocks_free == free + 10
    with pytest.raises(FileNotFoundError):
        two.vfs.open("/f")
    cluster.leave(two)


@pytest.mark.parametrize("moment", ["acquire", "release"])
def test_file_is_freed_whose_last_name_goes_while_it_is_opened_or_closed(
    volume: Volume, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The remover finds it open and leaves it to the other node, which must not have looked too
    early."""
    cluster, one, two = pair(volume)
    write(one.vfs, "/f", b"x" * 10 * BLOCK)
    free = one.vfs.statfs().blocks_free
    inode = two.fs.lookup(two.fs.root, b"f")
    handle = two.vfs.open("/f") if moment == "release" else -1
    plain = getattr(two.locks, moment)
    acted = False

    def meanwhile(name: bytes, mode: Mode) -> None:
        nonlocal acted
        if moment == "acquire":
            plain(name, mode)
        if name == lock_name(OPEN, inode.ino) and not acted:
            acted = True
            one.vfs.unlink("/f")
        if moment == "release":
            plain(name, mode)

    monkeypatch.setattr(two.locks, moment, meanwhile)
    if moment == "acquire":
        with pytest.raises(FileNotFoundError):
            two.vfs.open("/f")
    else:
        two.vfs.close(handle)
    monkeypatch.undo()

    assert acted
    assert one.vfs.statfs().blocks_free == free + 10
    cluster.leave(one)
    cluster.leave(two)
