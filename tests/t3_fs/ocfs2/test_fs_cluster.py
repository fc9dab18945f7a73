"""Several nodes of one volume in turns: each sees at once what the others did."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from fs.dlm.modes import Mode
from fs.errors import ImageError
from fs.ocfs2.recovery import SUPER_LOCK
from tests.support.ocfs2 import BLOCK, Volume, read, vfs_tree, write
from tests.t3_fs.ocfs2.conftest import MakeVolume
from tests.t3_fs.ocfs2.nodes import Cluster, Node, TableLocks


def pair(volume: Volume) -> tuple[Cluster, Node, Node]:
    """Two nodes."""
    cluster = Cluster(volume.path)
    return cluster, cluster.join(3), cluster.join(7)


def test_names_and_data_are_seen_at_once(volume: Volume) -> None:
    """Without any sync: the locks see to it."""
    cluster, one, two = pair(volume)
    assert (one.fs.slot, two.fs.slot) == (0, 1)
    one.vfs.mkdir("/d")
    write(one.vfs, "/d/f", b"one" * 5000)
    assert read(two.vfs, "/d/f") == b"one" * 5000
    write(two.vfs, "/d/f", b"two")
    assert read(one.vfs, "/d/f") == b"two"
    two.vfs.rename("/d/f", "/g")
    with pytest.raises(FileNotFoundError):
        one.vfs.stat("/d/f")
    assert read(one.vfs, "/g") == b"two"
    handle = one.vfs.open("/g", os.O_WRONLY | os.O_APPEND)
    other = two.vfs.open("/g", os.O_WRONLY | os.O_APPEND)
    for number in range(10):
        one.vfs.write(handle, b"%d" % number)
        two.vfs.write(other, b"%c" % (ord("a") + number))
    assert read(one.vfs, "/g") == b"two0a1b2c3d4e5f6g7h8i9j"
    one.vfs.close(handle)
    two.vfs.close(other)
    assert cluster.table.downconverts > 20
    cluster.leave(one)
    cluster.leave(two)


def test_what_did_not_change_is_not_read_again(volume: Volume) -> None:
    """A lock that comes back with the version that was known keeps its cached blocks."""
    cluster, one, two = pair(volume)
    one.vfs.mkdir("/d")
    write(one.vfs, "/d/f", b"x")
    two.vfs.stat("/d/f")
    inode = two.fs.lookup(two.fs.lookup(two.fs.root, b"d"), b"f")
    name = two.fs.lock_name(inode)
    serial = inode.serial
    # Another node takes the lock in EX and changes nothing.
    one.locks.acquire(name, Mode.EX)
    one.locks.release(name, Mode.EX)
    two.vfs.stat("/d/f")
    assert inode.serial == serial
    one.vfs.truncate("/d/f", 100)
    assert two.vfs.stat("/d/f").st_size == 100
    assert inode.serial == serial + 1
    cluster.leave(two)
    cluster.leave(one)


def test_a_file_that_another_node_has_open_is_not_freed(volume: Volume) -> None:
    """Its last closer frees it, whoever removed the name."""
    cluster, one, two = pair(volume)
    write(one.vfs, "/f", b"x" * 10 * BLOCK)
    free = one.vfs.statfs().blocks_free
    handle = two.vfs.open("/f", os.O_RDWR)
    one.vfs.unlink("/f")
    assert one.vfs.statfs().blocks_free == free
    assert two.vfs.pread(handle, 3, 5 * BLOCK) == b"xxx"
    two.vfs.pwrite(handle, b"y" * BLOCK, 12 * BLOCK)
    two.vfs.close(handle)
    assert one.vfs.statfs().blocks_free == free + 10
    with pytest.raises(FileNotFoundError):
        two.vfs.open("/f")
    cluster.leave(one)
    cluster.leave(two)


def test_a_number_that_is_used_again_is_another_file(volume: Volume) -> None:
    """What a node remembers of the old file is not taken for the new one."""
    cluster, one, two = pair(volume)
    write(one.vfs, "/f", b"old")
    old = two.fs.lookup(two.fs.root, b"f")
    assert read(two.vfs, "/f") == b"old"
    one.vfs.unlink("/f")
    one.vfs.sync()
    made = {}
    for number in range(2000):
        path = f"/n{number}"
        one.vfs.symlink("x", path)
        made[one.vfs.lstat(path).st_ino] = path
        if old.ino in made:
            break
    assert old.ino in made
    assert two.vfs.readlink(made[old.ino]) == "x"
    new = two.fs.lookup(two.fs.root, made[old.ino][1:].encode())
    assert new is not old and new.generation != old.generation
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)), two.fs.reading(old):
        pass
    cluster.leave(one)
    cluster.leave(two)


def test_inodes_are_taken_from_another_slot(make_image: MakeVolume) -> None:
    """A slot without a group, on a disk that has no 1024 clusters together."""
    cluster, one, two = pair(make_image(16))
    write(one.vfs, "/big", b"b" * (one.vfs.statfs().blocks_free - 500) * BLOCK)
    two.vfs.mkdir("/d")
    for number in range(10):
        write(two.vfs, f"/d/{number}", b"x")
    inode = two.fs.iget(two.vfs.stat("/d/9").st_ino)
    assert (two.fs.slot, inode.suballoc_slot) == (1, 0)
    two.vfs.unlink("/d/9")
    cluster.leave(one)
    cluster.leave(two)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_operations_of_three_nodes(make_image: MakeVolume, seed: int) -> None:
    """All nodes see the same tree, and it is what a single directory of the host would hold."""
    rng = random.Random(seed)
    cluster = Cluster(make_image(32, 3).path)
    nodes = [cluster.join(number) for number in (1, 2, 3)]
    files: dict[str, bytes] = {}
    nodes[0].vfs.mkdir("/a")
    nodes[1].vfs.mkdir("/b")
    for _ in range(400):
        vfs = rng.choice(nodes).vfs
        path = f"/{rng.choice('ab')}/{rng.randrange(12)}"
        action = rng.random()
        if action < 0.4:
            files[path] = rng.randbytes(rng.randrange(4 * BLOCK))
            write(vfs, path, files[path])
        elif action < 0.6 and path in files:
            assert read(vfs, path) == files[path], f"seed {seed}: {path}"
        elif action < 0.7 and path in files:
            vfs.unlink(path)
            del files[path]
        elif action < 0.8 and path in files:
            size = rng.randrange(6 * BLOCK)
            vfs.truncate(path, size)
            files[path] = files[path][:size].ljust(size, b"\0")
        elif action < 0.95 and path in files:
            other = f"/{rng.choice('ab')}/{rng.randrange(12)}"
            vfs.rename(path, other)
            files[other] = files.pop(path)
        elif action > 0.99:
            vfs.sync()
    trees = [vfs_tree(node.vfs) for node in nodes]
    assert trees[0] == trees[1] == trees[2], f"seed {seed}"
    found = {path: data for path, (kind, data) in trees[0].items() if kind == "file"}
    assert found == files, f"seed {seed}"
    for node in nodes:
        cluster.leave(node)


def test_a_volume_without_a_free_slot_says_who_has_them(volume: Volume) -> None:
    """By name; the others go on."""
    names = {3: "red", 7: "blue"}
    cluster, one, two = pair(volume)
    with pytest.raises(ImageError, match="no free slot: all are taken, by node red, node blue"):
        cluster.join(9, node_label=lambda node: f"node {names[node]}")
    cluster.kill(cluster.table.nodes[9])
    write(one.vfs, "/f", b"f")
    assert read(two.vfs, "/f") == b"f"
    for node in (one, two):
        cluster.leave(node)


def test_a_dead_node_is_recovered(volume: Volume, tmp_path: Path) -> None:
    """What it had synced is there; its orphans and its slot are free."""
    cluster, one, two = pair(volume)
    one.vfs.mkdir("/d")
    write(one.vfs, "/d/synced", b"s" * 3 * BLOCK)
    free = one.vfs.statfs().blocks_free
    handle = one.vfs.open("/d/orphan", os.O_RDWR | os.O_CREAT)
    one.vfs.write(handle, b"o" * 20 * BLOCK)
    one.vfs.unlink("/d/orphan")
    one.vfs.sync()
    write(one.vfs, "/d/lost", b"l")
    cluster.kill(one)
    assert two.fs.slot_nodes() == [3, 7]
    assert two.fs.recover_slot(0) > 0
    assert two.fs.slot_nodes() == [None, 7]
    assert two.fs.recover_slot(0) == 0
    assert two.vfs.listdir("/d") == ["synced"]
    assert read(two.vfs, "/d/synced") == b"s" * 3 * BLOCK
    assert two.vfs.statfs().blocks_free == free
    again = cluster.join(3)
    assert again.fs.slot == 0
    write(again.vfs, "/d/new", b"n")
    assert read(two.vfs, "/d/new") == b"n"
    cluster.leave(again)
    cluster.leave(two)
    assert tmp_path.exists()


def test_a_node_alone_recovers_all_slots_when_it_mounts(volume: Volume) -> None:
    """Both nodes die; what they synced is there, also for a mount that may not write."""
    cluster, one, two = pair(volume)
    write(one.vfs, "/one", b"1" * BLOCK)
    one.vfs.sync()
    write(two.vfs, "/two", b"2" * BLOCK)
    two.vfs.sync()
    write(two.vfs, "/gone", b"3")
    cluster.kill(one)
    cluster.kill(two)
    before = volume.path.read_bytes()
    looked = volume.mount(read_only=True)
    assert {"one", "two"} <= set(looked.listdir("/"))
    assert read(looked, "/two") == b"2" * BLOCK
    volume.unmount()
    assert volume.path.read_bytes() == before
    vfs = volume.mount(node=9)
    assert not vfs.fs.was_clean  # type: ignore[attr-defined]
    assert {"one", "two"} <= set(vfs.listdir("/"))
    assert read(vfs, "/one") == b"1" * BLOCK
    volume.unmount()
    assert volume.mount(node=9).fs.was_clean  # type: ignore[attr-defined]


def test_the_first_to_mount_after_a_power_cut_replays_all_journals(volume: Volume) -> None:
    """Also of nodes that are members again and have not mounted yet: replayed later, they would put
    older blocks over what the first one did."""
    cluster, one, two = pair(volume)
    one.vfs.mkdir("/d")
    for number in range(20):
        write(two.vfs, f"/d/{number}", b"two")
        write(one.vfs, f"/d/one{number}", b"one")
    two.vfs.sync()
    one.vfs.sync()
    write(two.vfs, "/d/last", b"two")
    two.vfs.sync()
    for node in (one, two):
        cluster.kill(node)
    after = Cluster(volume.path)
    # Both are in the cluster, as far as its members know.
    first = after.join(3, live_nodes=None)
    for number in range(30):
        write(first.vfs, f"/d/new{number}", b"new")
    first.vfs.sync()
    second = after.join(7, live_nodes=None)
    assert read(second.vfs, "/d/last") == b"two"
    assert sorted(second.vfs.listdir("/d")) == sorted(first.vfs.listdir("/d"))
    assert len(first.vfs.listdir("/d")) == 71
    after.leave(second)
    after.leave(first)


def test_who_waits_to_mount_while_another_replays_has_read_nothing_old(
    make_image: MakeVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut of all nobody remembers the dead one's locks: what a mount has read before
    it gets the super lock may be what a journal, replayed meanwhile, has newer."""
    cluster = Cluster(make_image(slots=3).path)
    dead = cluster.join(1)
    for number in range(300):
        dead.vfs.mkdir(f"/{'name' * 20}{number}")
    dead.vfs.sync()
    entries = sorted(dead.vfs.listdir("/"))
    cluster.kill(dead)
    cluster.table.holds.clear()
    cluster.table.values.clear()

    acquire = TableLocks.acquire
    first: list[Node] = []

    def wait_for_the_first(locks: TableLocks, name: bytes, mode: Mode) -> None:
        if name == SUPER_LOCK and not first:
            monkeypatch.undo()
            first.append(cluster.join(2))
        acquire(locks, name, mode)

    monkeypatch.setattr(TableLocks, "acquire", wait_for_the_first)
    second = cluster.join(3)

    assert sorted(second.vfs.listdir("/")) == entries == sorted(first[0].vfs.listdir("/"))
    assert {name for name in entries if second.vfs.listdir(f"/{name}")} <= {"lost+found"}
    for node in (second, first[0]):
        cluster.leave(node)
