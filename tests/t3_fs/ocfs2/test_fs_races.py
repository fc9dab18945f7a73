"""Nodes get in each other's way at one exact moment, in one process.

Two operations of two nodes: the second one runs as a whole at a place of the first where that
takes a lock and holds none that the second could need. What comes out, results and tree, must be
what one after the other gives, in either order. `make test` runs each pair at one place by the
seed, CRASH_CLUSTER=1 at all.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator

import pytest

from fs.dlm.modes import Mode
from fs.inode import Inode
from fs.ocfs2.locking import DENTRY, META, OPEN, RENAME, lock_name
from fs.vfs import Vfs
from tests.support.ocfs2 import ALL, BLOCK, Volume, read, write
from tests.t3_fs.ocfs2.nodes import Cluster, Node, TableLocks

Call = Callable[["Place"], object]
Result = tuple[list[object], dict[str, tuple[str, object]]]
"""What the calls returned, and the tree that they left."""


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


def test_file_that_is_removed_as_soon_as_it_is_there_is_made_once(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is open at its maker from the beginning, and not made anew because it is gone."""
    cluster, one, two = pair(volume)
    free = two.vfs.statfs().blocks_free
    plain = one.fs.create

    def create(directory: Inode, name: bytes, mode: int) -> Inode:
        inode = plain(directory, name, mode)
        two.vfs.unlink("/f")
        return inode

    monkeypatch.setattr(one.fs, "create", create)
    handle = one.vfs.open("/f", os.O_CREAT | os.O_EXCL | os.O_RDWR)
    assert two.vfs.listdir("/") == ["lost+found"]
    one.vfs.write(handle, b"x")
    assert one.vfs.pread(handle, 2, 0) == b"x"
    one.vfs.close(handle)
    assert two.vfs.statfs().blocks_free == free
    cluster.leave(one)
    cluster.leave(two)


def test_block_of_a_removed_directory_is_another_ones_later(volume: Volume) -> None:
    """What a node has cached of a block goes by the inode that it belonged to."""
    cluster, one, two = pair(volume)
    one.vfs.mkdir("/x")
    block = first_block(two, "/x")
    assert two.vfs.listdir("/x") == []
    one.vfs.rmdir("/x")
    cluster.leave(one)
    # It has forgotten how far its search for free clusters was.
    one = cluster.join(3)
    one.vfs.symlink("takes its inode", "/z")
    one.vfs.mkdir("/y")
    assert first_block(one, "/y") == block
    one.vfs.symlink("anything", "/y/f")
    assert two.vfs.listdir("/y") == ["f"]
    cluster.leave(one)
    cluster.leave(two)


def test_number_that_is_used_again_was_looked_at_in_between(volume: Volume) -> None:
    """A node has cached that nobody uses the inode; its next life has another version."""
    cluster, one, two = pair(volume)
    write(one.vfs, "/f", b"old")
    old = two.fs.lookup(two.fs.root, b"f")
    one.vfs.unlink("/f")
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)), two.fs.reading(old):
        pass
    cluster.leave(one)
    # It has forgotten how far its search for free inodes was.
    one = cluster.join(3)
    one.vfs.symlink("anything", "/new")
    assert one.vfs.lstat("/new").st_ino == old.ino
    assert two.vfs.readlink("/new") == "anything"
    cluster.leave(one)
    cluster.leave(two)


def test_name_that_two_nodes_move_is_moved_by_one(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one finds its file under the new name already; it is not two names of one file."""
    cluster, one, two = pair(volume)
    write(one.vfs, "/f", b"f")
    plain = one.fs._renames._names.find
    acted = False

    def find(directory: Inode, name: bytes) -> Inode | None:
        nonlocal acted
        if name == b"g" and not acted:
            acted = True
            two.vfs.rename("/f", "/g")
        return plain(directory, name)

    monkeypatch.setattr(one.fs._renames._names, "find", find)
    with pytest.raises(FileNotFoundError):
        one.fs.rename(one.fs.root, b"f", one.fs.root, b"g")
    assert acted
    cluster.leave(one)
    cluster.leave(two)


def first_block(node: Node, path: str) -> int:
    """Where a directory begins."""
    directory = node.fs.iget(node.vfs.stat(path).st_ino)
    with node.fs.reading(directory):
        return node.fs.map_blocks(directory, 0, 1)[0]


class Place:
    """One node in the folder of one case, with a file open."""

    def __init__(self, node: Node, folder: str) -> None:
        self.node = node
        self.vfs: Vfs = node.vfs
        self._folder = folder
        self.handle: int = self.vfs.open(self.path("file"), os.O_RDWR | os.O_APPEND)
        self.other: int = self.vfs.open(self.path("file"), os.O_RDWR)

    def path(self, name: str) -> str:
        """A name in the folder, or the folder."""
        return f"{self._folder}/{name}".rstrip("/")

    def close(self, handle: int) -> None:
        """A handle that was only to be had."""
        self.vfs.close(handle)

    def call(self, name: str) -> object:
        """The result, or the name of the error."""
        try:
            return CALLS[name](self)
        except OSError as reason:
            return errno.errorcode[reason.errno or 0]

    def leave(self) -> None:
        """No file is open any more."""
        self.vfs.close(self.handle)
        self.vfs.close(self.other)


CALLS: dict[str, Call] = {
    "create": lambda at: at.close(at.vfs.open(at.path("new"), os.O_CREAT | os.O_EXCL)),
    "create within": lambda at: at.close(at.vfs.open(at.path("empty/new"), os.O_CREAT | os.O_EXCL)),
    "open or create": lambda at: at.close(at.vfs.open(at.path("new"), os.O_CREAT)),
    "open": lambda at: at.close(at.vfs.open(at.path("file"))),
    "mkdir": lambda at: at.vfs.mkdir(at.path("new")),
    "mkdir within": lambda at: at.vfs.mkdir(at.path("empty/new")),
    "symlink": lambda at: at.vfs.symlink("target", at.path("new")),
    "link": lambda at: at.vfs.link(at.path("file"), at.path("new")),
    "link within": lambda at: at.vfs.link(at.path("file"), at.path("empty/new")),
    "unlink": lambda at: at.vfs.unlink(at.path("file")),
    "unlink other": lambda at: at.vfs.unlink(at.path("other")),
    "rmdir": lambda at: at.vfs.rmdir(at.path("empty")),
    "rename": lambda at: at.vfs.rename(at.path("file"), at.path("new")),
    "rename back": lambda at: at.vfs.rename(at.path("new"), at.path("file")),
    "rename over": lambda at: at.vfs.rename(at.path("file"), at.path("other")),
    "rename over file": lambda at: at.vfs.rename(at.path("other"), at.path("file")),
    "rename within": lambda at: at.vfs.rename(at.path("file"), at.path("empty/new")),
    "rename directory": lambda at: at.vfs.rename(at.path("empty"), at.path("new")),
    "rename over directory": lambda at: at.vfs.rename(at.path("full"), at.path("empty")),
    "rename directory down": lambda at: at.vfs.rename(at.path("full"), at.path("empty/new")),
    "rename directory down too": lambda at: at.vfs.rename(at.path("empty"), at.path("full/new")),
    "rename up": lambda at: at.vfs.rename(at.path("full/inner"), at.path("new")),
    "append": lambda at: at.vfs.write(at.handle, b"a" * 5000),
    "write": lambda at: at.vfs.pwrite(at.other, b"w" * 3000, 3000),
    "cut": lambda at: at.vfs.ftruncate(at.handle, 100),
    "cut by name": lambda at: at.vfs.truncate(at.path("file"), 7000),
    "read": lambda at: at.vfs.pread(at.handle, 20000, 0),
    "list": lambda at: sorted(at.vfs.listdir(at.path(""))),
    "stat": lambda at: at.vfs.stat(at.path("file")).st_size,
    "links": lambda at: at.vfs.fstat(at.handle).st_nlink,
}


class Game:
    """Two nodes, and cases in folders of their own."""

    def __init__(self, volume: Volume) -> None:
        self.cluster, self.one, self.two = pair(volume)
        self._cases = 0
        self.interruptions = 0

    def case(self) -> tuple[Place, Place]:
        """A fresh folder; the nodes take turns at making it and at knowing its names, so what they
        have cached differs."""
        self._cases += 1
        folder = f"/{self._cases}"
        maker = (self.one, self.two)[self._cases % 2].vfs
        directories, files = ("", "empty", "full"), ("file", "other", "full/inner")
        for name in directories:
            maker.mkdir(f"{folder}/{name}")
        for name in files:
            write(maker, f"{folder}/{name}", name.encode() * 1000)
        for number, node in enumerate((self.one, self.two)):
            for name in (*directories, *files) * (2 * (self._cases >> 1 + number & 1)):
                node.vfs.lstat(f"{folder}/{name}")
        return Place(self.one, folder), Place(self.two, folder)

    def outcome(self, one: Place, two: Place, results: list[object]) -> Result:
        """What came of a case, alike for both nodes; then it is removed."""
        for place in (one, two):
            place.leave()
        tree, other = (case_tree(place) for place in (one, two))
        assert tree == other
        for path, (kind, _) in sorted(tree.items(), reverse=True):
            (one.vfs.rmdir if kind == "dir" else one.vfs.unlink)(one.path(path))
        return results, tree

    def in_turns(self, first: str, second: str, *, swapped: bool) -> Result:
        """One whole operation after the other."""
        one, two = self.case()
        if swapped:
            late = two.call(second)
            return self.outcome(one, two, [one.call(first), late])
        return self.outcome(one, two, [one.call(first), two.call(second)])

    def interrupted(self, first: str, second: str, moment: int) -> Result | None:
        """The second operation at one moment of the first; None when it has no such moment."""
        one, two = self.case()
        late: list[object] = []
        moments = 0
        plain = one.node.locks.try_acquire

        def try_acquire(name: bytes, mode: Mode, *, wait: bool = False) -> bool:
            nonlocal moments
            if moments <= moment and is_free(one.node.locks, second):
                moments += 1
                if moments > moment:
                    self.interruptions += 1
                    late.append(two.call(second))
            return plain(name, mode, wait=wait)

        one.node.locks.try_acquire = try_acquire  # type: ignore[method-assign]
        result = one.call(first)
        del one.node.locks.try_acquire
        found = self.outcome(one, two, [result, *late])
        return found if late else None


def is_free(locks: TableLocks, second: str) -> bool:
    """Whether another node can run an operation now without waiting for this one."""
    held = {name[:1] for (name, _mode), uses in locks.uses.items() if uses}
    moves = second.startswith("rename")
    takes_a_name = moves or second.startswith(("unlink", "rmdir"))
    waits = (RENAME in held and moves) or (DENTRY in held and takes_a_name)
    return META not in held and not waits


def case_tree(place: Place) -> dict[str, tuple[str, object]]:
    """What is in the folder of a case."""
    top = place.path("")
    found: dict[str, tuple[str, object]] = {}
    for path, directories, others in place.vfs.walk(top):
        inside = path.removeprefix(top).strip("/")
        found[inside] = ("dir", sorted([*directories, *others]))
        for name in others:
            where = f"{inside}/{name}".strip("/")
            if place.vfs.lstat(place.path(where)).st_mode & 0o170000 == 0o120000:
                found[where] = ("link", place.vfs.readlink(place.path(where)))
            else:
                stat = place.vfs.stat(place.path(where))
                content = read(place.vfs, place.path(where))
                found[where] = ("file", (stat.st_nlink, content))
    return found


TWO_LOOKS = {
    "link": ("EEXIST", "ENOENT"),
    "link within": ("EEXIST", "ENOENT"),
    "rename directory down": ("EINVAL",),
    "rename directory down too": ("EINVAL",),
}
"""Operations that look two paths up, one after the other, as on Linux, and how they fail when the
first one has come to mean something else meanwhile. Nothing else may come of that."""


def judge(game: Game, first: str, second: str, moments: Iterable[int]) -> Iterator[str]:
    """What came of a pair and can't be."""
    fine = [game.in_turns(first, second, swapped=swapped) for swapped in (False, True)]
    if first in TWO_LOOKS:
        alone = game.in_turns("stat", second, swapped=False)
        fine += [([error, alone[0][1]], alone[1]) for error in TWO_LOOKS[first]]
    for moment in moments:
        found = game.interrupted(first, second, moment)
        if found is None:
            return
        if found not in fine:
            yield f"{first}, {second} at {moment}: {found}, and not one of {fine}"


ALWAYS = ("rename directory down", "rename directory down too")
"""Two directories that go into each other would be out of reach."""


@pytest.mark.timeout(900)
def test_interrupted_operation_is_as_one_after_the_other(volume: Volume) -> None:
    """Every pair of operations, the second at a moment of the first."""
    game = Game(volume)
    seed = int(os.environ.get("TMEM_RACES_FIRST", "1"))
    chance = random.Random(seed)
    pairs = list(itertools.product(CALLS, CALLS))
    wrong: list[str] = []
    for first, second in pairs if ALL else [ALWAYS, ALWAYS[::-1], *chance.sample(pairs, 64)]:
        some = [chance.randrange(4), chance.randrange(4, 9)]
        every = ALL or (first in ALWAYS and second in ALWAYS)
        wrong += judge(game, first, second, itertools.count() if every else some)
    assert wrong == [], f"seed {seed}"
    assert game.interruptions > 40
    game.cluster.leave(game.one)
    game.cluster.leave(game.two)
