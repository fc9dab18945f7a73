"""A node dies at a block write, in the middle of what it did: another one recovers its slot."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.support.ocfs2 import ALL, BLOCK, Volume, faults, read, write
from tests.t3_fs.ocfs2.nodes import Cluster, Node

STEPS = 60
STEP = 1 if ALL else 12
"""Every so many writes of the dying node are a place of its death."""
PATHS = [f"/{directory}/{number}" for directory in "ab" for number in range(4)]

Candidates = dict[str, set[bytes | None]]
"""What a file may hold when its node dies now; None: no such file."""


def look(node: Node, path: str) -> bytes | None:
    """A file's content at a node, or None."""
    try:
        return read(node.vfs, path)
    except FileNotFoundError:
        return None


class Play:
    """Two nodes at work on a few files; the first one dies after some writes."""

    def __init__(self, path: Path, seed: int, dies_after: int | None) -> None:
        self.rng = random.Random(seed)
        self.cluster = Cluster(path)
        self.mortal = self.cluster.join(1)
        self.other = self.cluster.join(2)
        self.mortal.device.cut_after = dies_after
        self.may: Candidates = {path: {None} for path in PATHS}

    @property
    def dead(self) -> bool:
        """The first node is no more."""
        return self.mortal.number not in self.cluster.table.nodes

    def step(self) -> None:
        """One operation of one of the nodes."""
        rng = self.rng
        action, path, target = rng.random(), rng.choice(PATHS), rng.choice(PATHS)
        data = rng.randbytes(rng.randrange(3 * BLOCK))
        if rng.random() < 0.6:
            if not self.dead:
                self.of_the_mortal(action, path, target, data)
        elif action < 0.4:
            write(self.other.vfs, path, data)
            self.may[path] = {data}
        elif action < 0.9:
            self.check(path)
        elif look(self.other, path) is not None:
            self.other.vfs.unlink(path)
            self.may[path] = {None}

    def of_the_mortal(self, action: float, path: str, target: str, data: bytes) -> None:
        """What it did is certain only once it is synced or another node has seen it."""
        vfs, may = self.mortal.vfs, self.may
        try:
            if action < 0.45:
                # Made anew: empty first, then filled.
                may[path] |= {b"", data} | {data[: n * BLOCK] for n in range(4)}
                write(vfs, path, data)
            elif action < 0.6:
                if look(self.mortal, path) is not None:
                    may[path] |= {None}
                    vfs.unlink(path)
            elif action < 0.75:
                held = look(self.mortal, path)
                if held is not None and path != target:
                    may[target] |= {held}
                    may[path] |= {None}
                    vfs.rename(path, target)
            elif action < 0.9:
                vfs.sync()
                for one in PATHS:
                    may[one] = {look(self.mortal, one)}
            else:
                held = look(self.mortal, path)
                assert held in may[path]
        except OSError:
            if not self.mortal.device.cut:
                raise
            if not self.dead:
                self.mortal.locks.uses.clear()
                self.cluster.table.bury(self.mortal, self.other)

    def check(self, path: str) -> None:
        """The survivor sees one of the states that may be."""
        seen = look(self.other, path)
        assert seen in self.may[path], f"{path}: {seen!r:.40} of {len(self.may[path])}"
        self.may[path] = {seen}

    def run(self) -> int:
        """All steps; returns how often the first node wrote a block."""
        self.other.vfs.mkdir("/a")
        self.other.vfs.mkdir("/b")
        for _ in range(STEPS):
            self.step()
        for path in PATHS:
            self.check(path)
        writes = self.mortal.device.writes
        if not self.dead:
            self.cluster.leave(self.mortal)
        self.cluster.leave(self.other)
        return writes


@pytest.mark.parametrize("seed", range(2))
def test_a_node_dies_at_a_write(volume: Volume, seed: int) -> None:
    """Wherever: the survivor sees what was certain, and the volume is whole."""
    good = volume.path.with_name("good")
    shutil.copyfile(volume.path, good)
    total = Play(volume.path, seed, None).run()
    assert total > 150
    died = 0
    begin = 8  # the first ones claim the slot, before the nodes are at work
    for after in range(begin, total, STEP):
        shutil.copyfile(good, volume.path)
        where = f"seed {seed}, death after {after} of {total} writes"
        play = Play(volume.path, seed, after)
        try:
            play.run()
        except Exception as reason:
            raise AssertionError(where) from reason
        died += play.dead
        if (after - begin) // STEP % 4 == 0:
            assert faults(volume.path) == [], where
    assert died > (total - begin) // STEP // 2
