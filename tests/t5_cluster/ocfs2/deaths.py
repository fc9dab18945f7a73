"""A node dies at every step of a workload, and the others go on.

A step is a message sent or delivered, a block written or a flush, of any node: so the victim dies
in the middle of what it does, while it waits, while it gives up a lock, and while others do any
of this. The survivors recover it as guests do, and finish the workload, where what the victim did
last may be missing. A state is named `death/SEED/LENGTH/VICTIM/STEP`.

It holds when some number of the victim's operations explains everything: what each operation of
the survivors gave, and the volume at the end. What was promised is among them.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter

from tests.t5_cluster.ocfs2.judgement import Seen, Width, fsck_agrees, is_whole, recovered, works
from tests.t5_cluster.ocfs2.model import Effect, Model
from tests.t5_cluster.ocfs2.operations import Kind
from tests.t5_cluster.ocfs2.oracle import Oracle, agree
from tests.t5_cluster.ocfs2.poisoned import POISONED, HostilePool, checksums_hold
from tests.t5_cluster.ocfs2.workload import volume, workload
from tests.t5_cluster.ocfs2.world import SLOTS, World


class DeathRun:
    """One workload, one victim, and all its deaths."""

    def __init__(self, seed: int, length: int, victim: int, *, poisoned: bool = False) -> None:
        """`poisoned`: the nodes share a pool of an attacker's, and verify."""
        self.name = f"{POISONED if poisoned else ''}death/{seed}/{length}/{victim}"
        self._poisoned = poisoned
        self.counts: Counter[str] = Counter()
        self._seed = seed
        self._victim = victim
        self._image, self._base = volume(poisoned=poisoned)
        self._operations = workload(seed, length, poisoned=poisoned)
        world = World(self._image, seed, pool=HostilePool(seed) if poisoned else None)
        world.run(self._operations)
        self._oracle = Oracle(self._base, self._operations)
        self._began_at = world.began_at
        own = [(one.kind, number) for number, one in enumerate(self._operations)
               if one.node == victim]  # fmt: skip
        life = dict(own)
        begin, end = world.began_at[life[Kind.JOIN]], world.began_at[life[Kind.LEAVE] + 1]
        self.steps = range(begin + 1, end + 1)
        """While the victim is there."""

    def run(self, width: Width, part: int = 0, parts: int = 1) -> None:
        """Judge deaths, or one part of them; AssertionError names the one that fails."""
        deaths = self.steps[part * width.every :: width.every * parts]
        for number, step in enumerate(deaths):
            self._judge(step, fsck=number % width.fsck_every == 0)

    def replay(self, state: str) -> None:
        """Judge one death by its id."""
        self._judge(int(state.removeprefix(f"{self.name}/")), fsck=True)

    def some_step(self) -> int:
        """A step at which all nodes are there."""
        kinds = [operation.kind for operation in self._operations]
        begin, end = self._began_at[SLOTS], self._began_at[kinds.index(Kind.LEAVE)]
        return random.Random(self._seed).randrange(begin + 1, end + 1)

    def world(self, step: int) -> World:
        """What happens when the victim dies there."""
        pool = HostilePool(self._seed) if self._poisoned else None
        world = World(self._image, self._seed, victim=self._victim, dies_at=step, pool=pool)
        world.run(self._operations)
        return world

    def lost(self, world: World) -> dict[int, Effect]:
        """The operations of the victim that are gone after its death, or never began."""
        assert world.died_in is not None
        count = self._explained(world, recovered(world.disk.copy(), 0)[1])
        return {
            number: self._oracle.effects[number] if number <= world.died_in else Effect()
            for number, operation in enumerate(self._operations)
            if operation.node == self._victim and self._counts(number) > count
        }

    def _judge(self, step: int, *, fsck: bool) -> None:
        name = f"{self.name}/{step}"
        try:
            world = self.world(step)
            self.counts["deaths"] += 1
            if self._poisoned:
                self.counts += checksums_hold(world.disk.copy())
                self.counts["mismatches"] += sum(one.mismatches for one in world.verifications)
            if self._somebody_recovered(world):
                is_whole(world.disk)
            device = world.disk.copy()
            vfs, seen = recovered(device, zlib.crc32(name.encode()) % (SLOTS + 1))
            self._explained(world, seen)
            works(vfs)
            is_whole(device)
            if fsck:
                self.counts["fsck runs"] += 1
                fsck_agrees(device)
        except Exception as reason:
            raise AssertionError(f"{name}: {reason}") from reason

    def _somebody_recovered(self, world: World) -> bool:
        """Who leaves later than the victim dies, leaves when it is recovered."""
        assert world.died_in is not None
        later = self._operations[world.died_in + 1 :]
        return any(one.kind == Kind.LEAVE and one.node != self._victim for one in later)

    def _explained(self, world: World, seen: Seen) -> int:
        """The number of the victim's operations that explains all that is seen; the highest."""
        assert world.died_in is not None
        victim = self._victim
        least = self._oracle.promised(range(world.died_in))[victim]
        most = self._oracle.counts[world.died_in][victim]
        wrong = []
        for count in range(most, least - 1, -1):
            problem = self._explains(count, world, seen)
            if problem is None:
                return count
            wrong.append(f"{count}: {problem}")
        raise AssertionError(f"no number of node {victim}'s operations fits; {'; '.join(wrong)}")

    def _explains(self, count: int, world: World, seen: Seen) -> str | None:
        """Why the first `count` operations of the victim can't be what there was of it."""
        assert world.died_in is not None
        model: Model = self._base.copy()
        for number, operation in enumerate(self._operations):
            if operation.node == self._victim and number > world.died_in:
                continue
            if operation.node != self._victim or self._counts(number) <= count:
                outcome = world.outcomes[number]
                if not agree(model.apply(number + 1, operation).outcome, outcome):
                    return f"{operation} gave {outcome!r:.60}"
            else:
                model.maybe(self._oracle.effects[number])
            if number == world.died_in:
                model.forget_handles(self._victim)
        if model.shape() != seen.shape:
            return f"the tree differs in {sorted(map(str, model.shape() ^ seen.shape))[:4]}"
        path = model.contents_differ(seen.contents)
        return None if path is None else f"the content of {path} can't be"

    def _counts(self, number: int) -> int:
        return self._oracle.counts[number][self._victim]
