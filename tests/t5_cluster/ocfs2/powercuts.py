"""The power of the whole host goes at every disk write, while several journals are dirty.

All nodes' writes are in one log, in order of time, and a flush of any node ends an epoch. A state
is named `power/SEED/LENGTH/CUT[/CUT]`: the second cut is one of the recovery after the first.

With a death before it, `both/SEED/LENGTH/VICTIM/STEP/CUT[/CUT]`, a node dies at a step, and the log
goes on with the recovery by the others, whose journals are dirty as well.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections import Counter
from collections.abc import Iterator

from fs.block.memory import MemoryDevice
from fs.block.writelog import LoggingDevice, PowerCut, PowerCuts, power_cuts
from tests.t5_cluster.ocfs2.deaths import DeathRun
from tests.t5_cluster.ocfs2.judgement import (
    Seen,
    Width,
    fsck_agrees,
    is_whole,
    mount,
    recovered,
    works,
)
from tests.t5_cluster.ocfs2.model import Effect
from tests.t5_cluster.ocfs2.oracle import Oracle, Vector, agree
from tests.t5_cluster.ocfs2.poisoned import POISONED, HostilePool, checksums_hold
from tests.t5_cluster.ocfs2.workload import volume, workload
from tests.t5_cluster.ocfs2.world import SLOTS, World


class PowerCutRun:
    """One workload, and all its power cuts."""

    def __init__(
        self,
        seed: int,
        length: int,
        death: tuple[int, int | None] | None = None,
        *,
        poisoned: bool = False,
    ) -> None:
        """`death`: the victim, and the step at which it dies; None: one drawn from the seed.
        `poisoned`: the nodes share a pool of an attacker's, and verify."""
        self._poisoned = poisoned
        prefix = POISONED if poisoned else ""
        self.counts: Counter[str] = Counter()
        self._seed = seed
        self._before, model = volume(poisoned=poisoned)
        operations = workload(seed, length, poisoned=poisoned)
        lost: dict[int, Effect] = {}
        if death is None:
            self.name = f"{prefix}power/{seed}/{length}"
            self._world = World(self._before, seed, pool=HostilePool(seed) if poisoned else None)
            self._world.run(operations)
        else:
            deaths = DeathRun(seed, length, death[0], poisoned=poisoned)
            step = death[1] or deaths.some_step()
            self.name = f"{prefix}both/{seed}/{length}/{death[0]}/{step}"
            self._world = deaths.world(step)
            lost = deaths.lost(self._world)
        self._oracle = Oracle(model, operations, lost)
        for number, effect in enumerate(self._oracle.effects):
            outcome = self._world.outcomes[number]
            assert agree(effect.outcome, outcome), f"{self.name}: {operations[number]}: {outcome}"
        self._epochs = self._world.log.epochs
        self.writes = sum(len(epoch.writes) for epoch in self._epochs)

    def run(self, width: Width, part: int = 0, parts: int = 1) -> None:
        """Judge the states, or one part of them; AssertionError names the one that fails."""
        states = PowerCuts(self._before, self._epochs)
        every = width.every * parts
        for number, cut in enumerate(self._cuts(width)):
            if number % every != part * width.every:
                continue
            disk = states.state(cut)
            self.counts["power cuts"] += 1
            name = f"{self.name}/{cut}"
            fsck = number // every % width.fsck_every == 0
            self._judge(cut, disk, name, fsck=fsck)
            if zlib.crc32(name.encode()) % width.again_every == 0:
                self._cut_again(cut, disk, width, fsck=fsck)

    def replay(self, state: str) -> None:
        """Judge one state by its id."""
        first, *second = state.removeprefix(f"{self.name}/").split("/")
        cut = PowerCut.from_id(first)
        disk = PowerCuts(self._before, self._epochs).state(cut)
        if second:
            log = _recovery(disk, f"{self.name}/{cut}")
            disk = PowerCuts(disk, log.epochs).state(PowerCut.from_id(second[0]))
        self._judge(cut, disk, state, fsck=True)

    def _cuts(self, width: Width) -> Iterator[PowerCut]:
        return power_cuts(
            self._epochs,
            random.Random(self._seed),
            subset_writes_max=width.subset_writes_max,
            samples=width.samples,
            torn_each=width.torn_each,
        )

    def _cut_again(self, cut: PowerCut, disk: MemoryDevice, width: Width, *, fsck: bool) -> None:
        name = f"{self.name}/{cut}"
        log = _recovery(disk, name)
        states = PowerCuts(disk, log.epochs)
        cuts = power_cuts(
            log.epochs,
            random.Random(zlib.crc32(name.encode())),
            subset_writes_max=min(width.subset_writes_max, 4),
            samples=min(width.samples, 4),
            torn_each=min(width.torn_each, 1),
        )
        for number, second in enumerate(cuts):
            self.counts["recovery cuts"] += 1
            again = states.state(second)
            self._judge(cut, again, f"{name}/{second}", fsck=fsck and number % 50 == 0)

    def _judge(self, cut: PowerCut, disk: MemoryDevice, name: str, *, fsck: bool) -> None:
        device = disk.copy()
        try:
            if self._poisoned:
                self.counts += checksums_hold(disk.copy())
            vfs, seen = recovered(device, _mounter(name))
            self._must_be_allowed(cut, seen)
            works(vfs)
            is_whole(device)
            if fsck:
                self.counts["fsck runs"] += 1
                fsck_agrees(device)
        except Exception as reason:
            raise AssertionError(f"{name}: {reason}") from reason

    def _must_be_allowed(self, cut: PowerCut, seen: Seen) -> None:
        least, most = self._bounds(cut.epoch)
        allowed = self._allowed(least, most)
        wrong = "the tree is none of those that may be"
        for vector in allowed.get(frozenset(seen.shape), ()):
            path = self._oracle.model(vector).contents_differ(seen.contents)
            if path is None:
                return
            wrong = f"the content of {path} can't be"
        raise AssertionError(f"{wrong}, with {least} to {most} of the nodes' operations")

    def _bounds(self, epoch: int) -> tuple[Vector, Vector]:
        marks = [mark for mark in self._epochs[epoch].marks if isinstance(mark, int)]
        begun = max(
            (number for number, began in enumerate(self._world.epochs) if began <= epoch), default=0
        )
        return self._oracle.promised(marks), self._oracle.counts[begun]

    @functools.lru_cache(maxsize=8)  # noqa: B019 - lives as long as the run
    def _allowed(
        self, least: Vector, most: Vector
    ) -> dict[frozenset[tuple[str, object]], list[Vector]]:
        shapes: dict[frozenset[tuple[str, object]], list[Vector]] = {}
        for vector in self._oracle.vectors(least, most):
            shapes.setdefault(self._oracle.model(vector).shape(), []).append(vector)
        return shapes


def _mounter(name: str) -> int:
    """One of the nodes of the cluster, or a stranger."""
    return zlib.crc32(name.encode()) % (SLOTS + 1)


def _recovery(disk: MemoryDevice, name: str) -> LoggingDevice:
    device = LoggingDevice(disk.copy())
    mount(device, _mounter(name))
    return device
