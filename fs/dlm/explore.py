"""Every state that a small world can get into, one by one.

A world says what may happen next and lets one of these things happen. The explorer starts from
one world, takes every possible next step in every state it has not seen before, and checks each
state. It runs the real code: a state is a pickled copy of all objects, and two states are the same
if everything reachable from the world, apart from what the world leaves out of its `essence`, is
equal.

States are told apart by a 128-bit hash of their essence. Depth first, so that the memory taken
grows with the length of a history and the hashes, not with the breadth of the world. A failure
carries the steps that lead to it.
"""

from __future__ import annotations

import enum
import hashlib
import marshal
import pickle
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, Protocol, TypeAlias

Step: TypeAlias = tuple[Hashable, ...]


class World(Protocol):
    """A world that can be pickled."""

    def steps(self) -> Sequence[Step]:
        """What may happen next."""
        ...

    def take(self, step: Step) -> None:
        """Let it happen. Raises `AssertionError` if it breaks a promise."""
        ...

    def check(self) -> None:
        """Raises `AssertionError` if this state breaks a promise."""
        ...

    def check_end(self) -> None:
        """The same for a state in which nothing more can happen."""
        ...

    def essence(self) -> object:
        """What makes this state different from others."""
        ...


class Explored(NamedTuple):
    """What was seen."""

    states: int
    steps: int
    ends: int
    """States in which nothing more could happen."""
    deepest: int
    complete: bool
    """False if there was more than `states_max`."""


class Broken(AssertionError):
    """A promise is broken; the steps lead to it."""

    def __init__(self, problem: str, steps: Sequence[Step]) -> None:
        self.problem = problem
        self.steps = tuple(steps)
        super().__init__(f"{problem}\n  after " + "\n        ".join(map(repr, steps)))


def explore(start: World, *, states_max: int) -> Explored:
    """See every state, at most `states_max` of them."""
    seen = {fingerprint(start.essence())}
    todo: list[tuple[bytes, tuple[Step, ...]]] = [(pickle.dumps(start, -1), ())]
    steps_taken = ends = deepest = 0
    while todo:
        frozen, path = todo.pop()
        deepest = max(deepest, len(path))
        world: World = pickle.loads(frozen)  # our own bytes, of this process
        steps = world.steps()
        if not steps:
            ends += 1
            _expect(world.check_end, path)
        for position, step in enumerate(steps):
            if position:
                world = pickle.loads(frozen)
            there = (*path, step)
            _expect(lambda world=world, step=step: world.take(step), there)
            _expect(world.check, there)
            steps_taken += 1
            mark = fingerprint(world.essence())
            if mark in seen:
                continue
            if len(seen) >= states_max:
                return Explored(len(seen), steps_taken, ends, deepest, complete=False)
            seen.add(mark)
            todo.append((pickle.dumps(world, -1), there))
    return Explored(len(seen), steps_taken, ends, deepest, complete=True)


def replay(start: World, steps: Sequence[Step]) -> World:
    """Go the way of a failure again."""
    world: World = pickle.loads(pickle.dumps(start, -1))
    for step in steps:
        world.take(step)
        world.check()
    return world


def fingerprint(essence: object) -> bytes:
    """A hash of everything reachable, the same in every process."""
    return hashlib.blake2b(marshal.dumps(_plain(essence), 2), digest_size=16).digest()


def _expect(check: object, path: Sequence[Step]) -> None:
    assert callable(check)
    try:
        check()
    except AssertionError as problem:
        raise Broken(str(problem) or type(problem).__name__, path) from problem


_ATOMS = frozenset((int, bytes, str, bool, type(None)))


def _plain(thing: object) -> Any:
    """Nested tuples that are equal if the things are."""
    if type(thing) in _ATOMS:
        return thing
    if isinstance(thing, enum.Enum):
        return thing.value
    if isinstance(thing, (tuple, list, deque)):
        return tuple([_plain(each) for each in thing])
    if isinstance(thing, Mapping):
        items = [(_plain(key), _plain(value)) for key, value in thing.items()]
        return tuple(sorted(items, key=_sort_key))
    if isinstance(thing, AbstractSet):
        return tuple(sorted([_plain(each) for each in thing], key=_sort_key))
    names = getattr(type(thing), "__slots__", None)
    if names is None:
        names = sorted(vars(thing))
    return tuple([_plain(getattr(thing, name)) for name in names])


def _sort_key(thing: Any) -> bytes:
    return marshal.dumps(thing, 2)
