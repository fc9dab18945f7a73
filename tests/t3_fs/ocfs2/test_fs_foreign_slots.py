"""What Linux leaves in a slot when it dies and we never do: clusters set aside in the local alloc,
and clusters in the truncate log that were cut off files and not given back.

A node is made to leave such a slot, through its journal, and dies. Whoever takes the slot over must
give back what no file has, and nothing else. fsck.ocfs2 judges what was left and what became of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from fs.ocfs2 import recovery
from fs.ocfs2.format import (
    ID2_OFFSET,
    LOCAL_ALLOC_BITMAP_OFFSET,
    TRUNCATE_RECORD,
    Dinode,
    LocalAlloc,
    TruncateLogHeader,
)
from fs.ocfs2.inodelocks import Rank, Wanted
from fs.ocfs2.names import wants_child
from fs.vfs import Vfs
from tests.support.ocfs2 import ALL, BLOCK, Volume, debugfs, faults, problems, read, write
from tests.t3_fs.ocfs2.nodes import Cluster, Node

TURNS = 6
WINDOW = 256
"""Clusters that the slot has set aside."""
USED = (0, 3, 4, 9, 200, 255)
"""Those of them that a file has got since."""
RECORDS_AT = ID2_OFFSET + TruncateLogHeader.STRUCT.size


class Left:
    """What a node left: `kept` has clusters out of the window, `cut` has lost most of its own."""

    def __init__(self, node: Node, *, home: bool) -> None:
        vfs, fs = node.vfs, node.fs
        volume, slot = fs._volume, node.fs.slot
        assert slot == 0
        for turn in range(TURNS):
            for path in ("/kept", "/cut"):
                handle = vfs.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                vfs.write(handle, b"%03d " % turn * BLOCK)
                vfs.close(handle)
        vfs.sync()
        kept, cut = (fs.lookup(fs.root, name) for name in (b"kept", b"cut"))
        local, log = volume.system[b"local_alloc:0000"], volume.system[b"truncate_log:0000"]
        pages = kept.clusters
        self.free = vfs.statfs().blocks_free
        """Clusters when all is given back."""

        def leave() -> None:
            volume.touch(kept, cut)
            window = volume.space.clusters.allocate(WINDOW)
            assert window.length == WINDOW
            for bit in USED:
                volume.extents.append(kept, window.block + bit, 1, volume.space)
            kept.size = kept.clusters * BLOCK
            volume.dinodes.store(kept)
            buffer = volume.dinodes.buffer(local)
            volume.transactions.modify(buffer)
            raw = Dinode.read(buffer.data)
            raw.id1_low, raw.id1_high = len(USED), WINDOW
            raw.write_into(buffer.data)
            LocalAlloc(first_cluster=window.block).write_into(buffer.data)
            for bit in USED:
                buffer.data[LOCAL_ALLOC_BITMAP_OFFSET + bit // 8] |= 1 << bit % 8

            self.runs = volume.extents.truncate(cut, 1, volume.space, 1000)
            cut.size = cut.clusters * BLOCK
            volume.dinodes.store(cut)
            # Void records stay behind where Linux gave clusters back before it died.
            records = [self.runs[0], (0, 0), *self.runs[1:], (0, 7)]
            buffer = volume.dinodes.buffer(log)
            volume.transactions.modify(buffer)
            TruncateLogHeader(used=len(records)).write_into(buffer.data)
            for number, record in enumerate(records):
                TRUNCATE_RECORD.pack_into(buffer.data, RECORDS_AT + number * 8, *record)

        wants = [
            wants_child(kept),
            wants_child(cut),
            Wanted(Rank.SLOT_FILE, 0, local),
            Wanted(Rank.SLOT_FILE, 1, log),
            volume.space.wants_clusters,
        ]
        volume.run(wants, leave)
        assert len(self.runs) > 2, "one run would prove little"
        for number, block in enumerate(fs.map_blocks(kept, pages, len(USED))):
            fs.device.write(block, 1, b"w%03d" % number * (BLOCK // 4))
        self.kept = b"".join(b"%03d " % turn * BLOCK for turn in range(TURNS))
        self.kept += b"".join(b"w%03d" % number * (BLOCK // 4) for number in range(len(USED)))
        self.free += sum(count for _, count in self.runs) - len(USED)
        volume.transactions.commit()
        if home:
            volume.transactions.checkpoint()

    def check(self, vfs: Vfs) -> None:
        """All is given back, and can be used without harm to what files have."""
        vfs.sync()
        assert vfs.statfs().blocks_free == self.free
        assert read(vfs, "/kept") == self.kept
        assert read(vfs, "/cut") == (b"000 " * BLOCK)[:BLOCK]
        write(vfs, "/all", b"")
        write(vfs, "/all", bytes(vfs.statfs().blocks_free * BLOCK))
        assert vfs.statfs().blocks_free == 0
        assert read(vfs, "/kept") == self.kept
        vfs.unlink("/all")


def survivor(cluster: Cluster, volume: Volume) -> Vfs:
    """Another node that is there takes the slot over."""
    two = cluster.table.nodes[7]
    two.fs.recover_slot(0)
    assert two.fs.slot_nodes() == [None, 7]
    return two.vfs


def same(cluster: Cluster, volume: Volume) -> Vfs:
    """The same node comes back into its slot."""
    cluster.kill(cluster.table.nodes[7])
    return volume.mount(node=3)


def other(cluster: Cluster, volume: Volume) -> Vfs:
    """Both have died, and a third one mounts."""
    cluster.kill(cluster.table.nodes[7])
    return volume.mount(node=9)


@pytest.mark.parametrize("home", [True, False])
@pytest.mark.parametrize("take_over", [survivor, same, other])
def test_what_linux_leaves_is_given_back(
    volume: Volume, take_over: Callable[[Cluster, Volume], Vfs], *, home: bool
) -> None:
    """Whoever takes the slot over, and whether it was at home on the disk or in the journal."""
    cluster = Cluster(volume.path)
    one, _two = cluster.join(3), cluster.join(7)
    left = Left(one, home=home)
    cluster.kill(one)
    if home:
        assert faults(volume.path) == []
        found = problems(volume.path)
        assert {"LALLOC_IN_USE", "TRUNCATE_LOG_IN_USE"} <= {problem.code for problem in found}
        assert all(problem.pending for problem in found), found
        assert f"Bitmap Total: {WINDOW}   Used: {len(USED)}" in debugfs(
            volume.path, "stat //local_alloc:0000"
        )
    left.check(take_over(cluster, volume))
    for node in list(cluster.table.nodes.values()):
        cluster.leave(node)


def test_who_mounts_in_the_middle_of_a_mount_sees_what_that_has_changed(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut of all, the first to mount gives clusters back; before it is through with
    its mount another one takes its locks over."""
    before = Cluster(volume.path)
    one, two = before.join(3), before.join(7)
    left = Left(one, home=False)
    for node in (one, two):
        before.kill(node)
    cluster = Cluster(volume.path)
    free_orphans, second = recovery.free_orphans, []
    calls = count()

    def meanwhile(*arguments: Any) -> None:
        if not next(calls):
            second.append(cluster.join(7))
        free_orphans(*arguments)

    monkeypatch.setattr(recovery, "free_orphans", meanwhile)
    first = cluster.join(9)
    assert next(calls) > 1
    left.check(second[0].vfs)
    for node in (first, *second):
        cluster.leave(node)


def test_a_read_only_mount_leaves_it_where_it_is(volume: Volume) -> None:
    """It sees the files, and not a byte of the image differs."""
    cluster = Cluster(volume.path)
    one = cluster.join(3)
    left = Left(one, home=False)
    cluster.kill(one)
    before = volume.path.read_bytes()
    assert read(volume.mount(read_only=True), "/kept") == left.kept
    volume.unmount()
    assert volume.path.read_bytes() == before
    left.check(volume.mount(node=3))


def test_taking_over_can_be_cut_off_anywhere(volume: Volume, tmp_path: Path) -> None:
    """The survivor dies at each of its writes, and a third node gives back the same, once."""
    cluster = Cluster(volume.path)
    one, two = cluster.join(3), cluster.join(7)
    left = Left(one, home=True)
    good = cluster.snapshot(tmp_path / "good").read_bytes()
    cluster.kill(one)
    cluster.kill(two)
    writes = died = 0
    while True:
        volume.path.write_bytes(good)
        cluster = Cluster(volume.path)
        # It comes back into its own slot and is told to leave the other one alone at first.
        two = cluster.join(7, live_nodes=lambda: [3])
        two.device.cut_after = two.device.writes + writes
        try:
            two.fs.recover_slot(0)
        except OSError:
            assert two.device.cut
            died += 1
            cluster.kill(two)
            left.check(volume.mount(node=9))
            volume.unmount()
            assert faults(volume.path) == [], f"after {writes} writes"
        else:
            two.device.cut_after = None
            left.check(two.vfs)
            cluster.leave(two)
            break
        writes += 1 if ALL else 2
    assert died >= 2
