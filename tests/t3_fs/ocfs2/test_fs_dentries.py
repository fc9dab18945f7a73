"""Names that a node keeps: no question to their directory, and never one that is gone."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

import pytest

from fs.dlm.modes import Mode
from fs.ocfs2 import dentries
from fs.ocfs2.locking import DENTRY, dentry_lock_name, lock_name
from fs.vfs import Vfs
from tests.support.ocfs2 import Volume, write
from tests.t3_fs.ocfs2.nodes import Cluster, Node

NAMES = ("a", "b", "c", "d/a", "d/b")
STEPS = 1500


@pytest.fixture
def nodes(volume: Volume) -> Iterator[tuple[Node, Node]]:
    """Two nodes of one cluster."""
    cluster = Cluster(volume.path)
    pair = cluster.join(3), cluster.join(7)
    pair[0].vfs.mkdir("/d")
    yield pair
    for node in pair:
        cluster.leave(node)


def know(node: Node, path: str) -> int:
    """Look a path up until its names are kept; its inode."""
    node.vfs.lstat(path)
    return node.vfs.lstat(path).st_ino


def size_of(vfs: Vfs, path: str) -> int | None:
    """None: there is no such file."""
    try:
        return vfs.lstat(path).st_size
    except FileNotFoundError:
        return None


def test_kept_name_does_not_take_its_directory_from_who_makes_files_there(
    nodes: tuple[Node, Node],
) -> None:
    """It is asked for once, when something new is looked up."""
    one, two = nodes
    write(one.vfs, "/d/old", b"x")
    know(two, "/d/old")
    directory = lock_name(b"M", one.vfs.stat("/d").st_ino)
    given_up = 0
    plain = one.locks.downconvert

    def downconvert(name: bytes, to: Mode) -> None:
        nonlocal given_up
        given_up += name == directory
        plain(name, to)

    one.locks.downconvert = downconvert
    for number in range(30):
        write(one.vfs, f"/d/{number}", b"y")
        assert two.vfs.lstat("/d/old").st_size == 1
    assert given_up == 0
    assert two.vfs.lstat("/d/29").st_size == 1
    assert given_up == 1


@pytest.mark.parametrize("how", ["unlink", "rename", "rename over", "rmdir"])
def test_name_that_another_node_takes_away_is_gone(nodes: tuple[Node, Node], how: str) -> None:
    """Or another file's."""
    one, two = nodes
    if how == "rmdir":
        one.vfs.mkdir("/d/x")
    else:
        write(one.vfs, "/d/x", b"old")
    write(one.vfs, "/new", b"newer")
    know(two, "/d/x")
    if how == "rename":
        one.vfs.rename("/d/x", "/d/y")
    elif how == "rename over":
        one.vfs.rename("/new", "/d/x")
        assert two.vfs.lstat("/d/x").st_size == 5
        return
    else:
        getattr(one.vfs, how)("/d/x")
    with pytest.raises(FileNotFoundError):
        two.vfs.lstat("/d/x")


def test_removed_file_is_freed_though_its_name_was_kept_elsewhere(
    nodes: tuple[Node, Node],
) -> None:
    """A kept name is no use of the file."""
    one, two = nodes
    free = one.vfs.statfs().blocks_free
    write(one.vfs, "/d/x", b"x" * 40960)
    know(two, "/d/x")
    one.vfs.unlink("/d/x")
    assert one.vfs.statfs().blocks_free == free
    # The number is another file's at once; its old name must not lead there.
    write(one.vfs, "/d/z", b"z")
    with pytest.raises(FileNotFoundError):
        two.vfs.lstat("/d/x")


def test_name_is_worth_a_lock_at_the_second_lookup(nodes: tuple[Node, Node]) -> None:
    """And no lock stays for a name that is not kept."""
    one, two = nodes
    write(one.vfs, "/d/x", b"x")
    directory, file = (one.vfs.stat(path).st_ino for path in ("/d", "/d/x"))
    lock = dentry_lock_name(directory, file)
    holds = two.locks._table.holds
    two.vfs.lstat("/d/x")
    assert two.number not in holds.get(lock, {})
    two.vfs.lstat("/d/x")
    assert holds[lock][two.number] == Mode.PR
    one.vfs.unlink("/d/x")
    assert not holds[lock].keys() - {two.number}
    assert holds[lock].get(two.number, Mode.NL) == Mode.NL


def test_names_are_bounded(nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that was not used for longest goes, and its lock with it."""
    monkeypatch.setattr(dentries, "NAMES_MAX", 4)
    one, two = nodes
    for number in range(8):
        write(one.vfs, f"/d/{number}", b"x")
        know(two, f"/d/{number}")
    held = {
        name
        for name, holders in two.locks._table.holds.items()
        if name.startswith(DENTRY) and holders.get(two.number, Mode.NL) == Mode.PR
    }
    directory = one.vfs.stat("/d").st_ino
    root = two.fs.root.ino
    kept = {dentry_lock_name(directory, one.vfs.stat(f"/d/{n}").st_ino) for n in (5, 6, 7)}
    assert held == kept | {dentry_lock_name(root, directory)}


def test_interrupted_wait_for_a_name_leaves_no_lock_behind(nodes: tuple[Node, Node]) -> None:
    """The second of two locks can't be had: the first is not in use any more."""
    one, _ = nodes
    write(one.vfs, "/a", b"a")
    write(one.vfs, "/b", b"b")
    plain = one.locks.acquire
    asked = 0

    def acquire(name: bytes, mode: Mode) -> None:
        nonlocal asked
        if name.startswith(DENTRY):
            asked += 1
            if asked == 2:
                raise OSError(errno.EIO, "fenced")
        plain(name, mode)

    one.locks.acquire = acquire  # type: ignore[method-assign]
    with pytest.raises(OSError, match="fenced"):
        one.vfs.rename("/a", "/b")
    del one.locks.acquire
    assert one.locks.in_use == 0
    one.vfs.rename("/a", "/b")


def test_two_nodes_see_the_names_of_one(nodes: tuple[Node, Node]) -> None:
    """Random names made, taken and looked up at two nodes, against a dictionary."""
    seed = int(os.environ.get("TMEM_RACES_FIRST", "1"))
    rng = random.Random(seed)
    sizes: dict[str, int] = {}
    for step in range(STEPS):
        vfs = rng.choice(nodes).vfs
        name, other = rng.sample(NAMES, 2)
        path, action = f"/{name}", rng.choice(("look", "look", "look", "make", "take", "move"))
        where = f"seed {seed}, step {step}, {action} {name}"
        if action == "make" and name not in sizes:
            sizes[name] = step % 100
            write(vfs, path, b"." * sizes[name])
        elif action == "take" and name in sizes:
            vfs.unlink(path)
            del sizes[name]
        elif action == "move" and name in sizes:
            vfs.rename(path, f"/{other}")
            sizes[other] = sizes.pop(name)
        elif name in sizes:
            assert size_of(vfs, path) == sizes[name], where
        else:
            assert size_of(vfs, path) is None, where
    assert all(len(node.fs._names.dentries) for node in nodes)
