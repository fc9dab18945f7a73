"""Workloads: what the nodes do, drawn from a seed, and the volume that they find.

Phases take turns. In quiet ones each node changes what nobody else uses, and syncs, so that several
journals hold what is not home yet. In the others nodes work where all do, or in what was another
node's own, so that locks move and journals are written home.
"""

from __future__ import annotations

import functools
import random
from typing import Final

from fs.block.memory import MemoryDevice
from fs.ocfs2.mkfs import Parameters, blocks_needed, make_volume
from tests.t5_cluster.ocfs2.model import Directory, Effect, File, Model, Thing
from tests.t5_cluster.ocfs2.operations import Kind, Operation
from tests.t5_cluster.ocfs2.poisoned import HostilePool
from tests.t5_cluster.ocfs2.world import SLOTS, World

ROOM_BLOCKS: Final = 600
PAGE: Final = 4096
SHARED: Final = ("/all", "/long")
LONG_NAME: Final = "n" * 200
LONG_NAMES: Final = 16
"""So many in a directory of one block: the next ones make it grow."""
OLD_FILES: Final = 4
HELD: Final = "held"


@functools.cache
def volume(*, poisoned: bool = False) -> tuple[MemoryDevice, Model]:
    """The volume from before the workload, and what it holds; `poisoned`: checksums, too."""
    parameters = Parameters(SLOTS, b"sixteen bytes id", 7, 1_735_689_600, attributes=poisoned)
    device = MemoryDevice.empty(blocks_needed(parameters) + ROOM_BLOCKS)
    make_volume(device, parameters, fresh=True)
    operations = [*_all(Kind.JOIN), *_setup(), *_all(Kind.LEAVE)]
    world = World(device, 0, pool=HostilePool(0, honest=True) if poisoned else None)
    world.run(operations)
    assert not any(world.outcomes), "the volume can't be prepared"
    model = Model()
    for number, operation in enumerate(operations):
        # Numbers below zero: from before the workload.
        assert model.apply(-1 - number, operation).outcome is None
    return world.disk, model


def _setup() -> list[Operation]:
    """Old files and directories with gaps of free blocks between them: what is freed next to where
    a node allocates is used again soon."""
    made = [Operation(0, Kind.MKDIR, path) for path in SHARED]
    made += [Operation(0, Kind.MKDIR, f"/own{node}") for node in range(SLOTS)]
    for number in range(LONG_NAMES):
        made.append(Operation(0, Kind.CREATE, f"/long/{number:02}{LONG_NAME}"))
    rng = random.Random(0)
    gaps = []
    for number in range(OLD_FILES):
        for folder in ("/all", *(f"/own{node}" for node in range(SLOTS))):
            # Whose inodes come from whose allocator.
            node = 0 if folder == "/all" else int(folder[-1])
            for path in (f"{folder}/old{number}", f"{folder}/gap{number}"):
                data = rng.randbytes(rng.randrange(1, 3 * PAGE))
                made.append(Operation(node, Kind.CREATE, path))
                made.append(Operation(node, Kind.WRITE, path, data=data))
            gaps.append(Operation(node, Kind.UNLINK, path))
            if folder != "/all":
                made.append(Operation(node, Kind.MKDIR, f"{folder}/dir{number}"))
    return made + gaps


def workload(seed: int, length: int, *, poisoned: bool = False) -> list[Operation]:
    """All nodes come, do so many operations, and go; `poisoned`: all with the same few files,
    so that they get what others have put."""
    leaving = _all(Kind.LEAVE)
    draw = _DrawShared(seed) if poisoned else _Draw(seed)
    random.Random(seed).shuffle(leaving)
    return [*_all(Kind.JOIN), *draw.operations(length), *leaving]


def _all(kind: Kind) -> list[Operation]:
    # The first one gets slot 0, and so on.
    return [Operation(node, kind) for node in range(SLOTS)]


class _Draw:
    """Draws operations that succeed."""

    def __init__(self, seed: int) -> None:
        self._weights = _WEIGHTS
        self._rng = random.Random(seed)
        self._model = volume()[1].copy()
        self._names = 0
        self._node = 0

    def operations(self, length: int) -> list[Operation]:
        drawn: list[Operation] = []
        quiet, phase_end = True, 0
        while len(drawn) < length:
            if len(drawn) >= phase_end:
                quiet = not quiet
                phase_end = len(drawn) + self._rng.randrange(*((4, 8) if quiet else (12, 24)))
                if not quiet:
                    self._do(drawn, self._visits())
            if self._rng.random() < 0.5:
                self._node = self._rng.randrange(SLOTS)
            self._do(drawn, self._draw_quiet() if quiet else self._draw())
        return drawn

    def _do(self, drawn: list[Operation], operations: list[Operation]) -> None:
        for operation in operations:
            effect = self._model.apply(len(drawn) + 1, operation)
            assert not isinstance(effect.outcome, int), str(operation)
            drawn.append(operation)

    def _visits(self) -> list[Operation]:
        """Nodes look for what others have in their journals: first of all, when one has died."""
        step = self._rng.randrange(1, SLOTS)
        visits = []
        for node in range(SLOTS):
            place = f"/own{(node + step) % SLOTS}"
            found = self._any_file(place)
            if found is not None:
                visits.append(Operation(node, Kind.READ, found[0]))
            visits.append(Operation(node, Kind.CREATE, self._new_path(place)))
        return visits

    def _draw_quiet(self) -> list[Operation]:
        """What needs no lock that other nodes want, so that it stays in the journal."""
        rng, node = self._rng, self._node
        place = f"/own{node}"
        kind = rng.choice((*_QUIET, Kind.FSYNC, Kind.FSYNC, Kind.SYNC))
        new = self._new_path(place)
        found = self._any_file(place)
        if kind == Kind.SYNC:
            return [Operation(node, kind)]
        if kind == Kind.CREATE or found is None:
            return [Operation(node, Kind.CREATE, new)]
        if kind == Kind.SYMLINK:
            return [Operation(node, kind, new, "t" * 20)]
        path, file = found
        if kind == Kind.FSYNC:
            return [Operation(node, kind, path)]
        if kind == Kind.TRUNCATE:
            # In the last page.
            return [Operation(node, kind, path, size=file.size - file.size % PAGE // 2)]
        if kind == Kind.WRITE:
            offset = rng.randrange(file.size + 1)
            data = rng.randbytes(rng.randrange(file.size - offset + 1))
            return [Operation(node, kind, path, offset=offset, data=data)]
        return [Operation(node, kind, path, new)]

    def _draw(self) -> list[Operation]:
        rng, node = self._rng, self._node
        place = self._place()
        kind = rng.choices([*self._weights], weights=[*self._weights.values()])[0]
        new = self._new_path(place)
        found = self._any_file(place)
        match kind:
            case Kind.CREATE:
                data = rng.randbytes(self._length())
                return [Operation(node, kind, new), Operation(node, Kind.WRITE, new, data=data)]
            case Kind.MKDIR:
                return self._mkdir(place, new)
            case Kind.SYMLINK:
                return [Operation(node, kind, new, "t" * rng.choice((20, 3000)))]
            case Kind.SYNC:
                return [Operation(node, kind)]
            case Kind.LIST:
                return [Operation(node, kind, place)]
            case Kind.HOLD:
                return self._hold(found)
            case Kind.RMDIR:
                return self._demolish()
        return [] if found is None else self._draw_on_file(kind, place, *found)

    def _draw_on_file(self, kind: Kind, place: str, path: str, file: File) -> list[Operation]:
        rng, node = self._rng, self._node
        match kind:
            case Kind.WRITE:
                offset = rng.randrange(file.size + 1 + rng.choice((0, 0, PAGE)))
                data = rng.randbytes(self._length())
                return [Operation(node, kind, path, offset=offset, data=data)]
            case Kind.APPEND:
                return [Operation(node, kind, path, data=rng.randbytes(self._length()))]
            case Kind.TRUNCATE:
                size = rng.choice((0, rng.randrange(file.size + 1), file.size + 5000))
                return [Operation(node, kind, path, size=size)]
            case Kind.RENAME:
                there = rng.choice((*SHARED, place))
                over = self._any_file(there)
                if over is not None and over[1] is not file and rng.random() < 0.4:
                    return [Operation(node, kind, path, over[0])]
                return [Operation(node, kind, path, self._new_path(there))]
            case Kind.LINK:
                return [Operation(node, kind, path, self._new_path(rng.choice((*SHARED, place))))]
            case Kind.UNLINK:
                # What is free now is wanted at once.
                data, new = rng.randbytes(8 * PAGE), self._new_path(place)
                return [
                    Operation(node, kind, path),
                    Operation(node, Kind.CREATE, new),
                    Operation(node, Kind.WRITE, new, data=data),
                ]
            case _:
                return [Operation(node, kind, path)]

    def _place(self) -> str:
        chance = self._rng.random()
        if chance < 0.25:
            return self._rng.choice(SHARED)
        # What a node has to itself is in its journal only: others must find it after its death.
        return f"/own{self._node if chance < 0.75 else self._rng.randrange(SLOTS)}"

    def _mkdir(self, place: str, new: str) -> list[Operation]:
        empty = self._empty_directories(place)
        if empty and self._rng.random() < 0.5:
            return [Operation(self._node, Kind.RMDIR, empty[0])]
        return [Operation(self._node, Kind.MKDIR, new)]

    def _empty_directories(self, place: str) -> list[str]:
        return [
            f"{place}/{name}"
            for name, thing in self._directory(place).entries.items()
            if isinstance(thing, Directory) and not thing.entries
        ]

    def _demolish(self) -> list[Operation]:
        """A directory whose block is in the journal goes, and the block may get file data."""
        node, rng = self._node, self._rng
        place = f"/own{node}"
        empty = self._empty_directories(place)
        if not empty:
            return []
        path = rng.choice(empty)
        new = self._new_path(place)
        drawn = [
            Operation(node, Kind.CREATE, f"{path}/in"),
            Operation(node, Kind.FSYNC, f"{path}/in"),
            Operation(node, Kind.RENAME, f"{path}/in", new),
            Operation(node, Kind.RMDIR, path),
        ]
        if rng.random() < 0.5:
            drawn.append(Operation(node, Kind.SYNC))
        drawn.append(Operation(node, Kind.APPEND, new, data=rng.randbytes(12 * PAGE)))
        return [*drawn, Operation(node, Kind.FSYNC, new)]

    def _hold(self, found: tuple[str, File] | None) -> list[Operation]:
        """A file that is held open loses its name, and lives on until the handle is closed."""
        node, rng = self._node, self._rng
        if (node, HELD) in self._model.handles:
            data = rng.randbytes(self._length())
            return rng.choice(
                (
                    [Operation(node, Kind.RELEASE, target=HELD)],
                    [Operation(node, Kind.HELD_WRITE, target=HELD, data=data)],
                    [Operation(node, Kind.HELD_FSYNC, target=HELD)],
                )
            )
        if found is None:
            return []
        held = [Operation(node, Kind.HOLD, found[0], HELD)]
        if rng.random() < 0.8:
            held.append(Operation(node, Kind.UNLINK, found[0]))
            held.append(Operation(node, Kind.HELD_FSYNC, target=HELD))
        return held

    def _length(self) -> int:
        rng = self._rng
        return rng.choice((rng.randrange(1, 600), rng.randrange(1, 2 * PAGE), PAGE))

    def _directory(self, path: str) -> Directory:
        return self._model._walk(path, Effect())

    def _any_file(self, place: str) -> tuple[str, File] | None:
        directory = self._directory(place)
        files = [(name, thing) for name, thing in directory.entries.items() if _is_file(thing)]
        if not files:
            return None
        name, file = self._rng.choice(files)
        assert isinstance(file, File)
        return f"{place}/{name}", file

    def _new_path(self, place: str) -> str:
        self._names += 1
        return f"{place}/{self._names:03}{LONG_NAME if place == '/long' else ''}"


class _DrawShared(_Draw):
    """All nodes work on the files of one directory, whose names stay as they are: a name that is
    looked up often is kept, so that its directory is not touched, which the oracle doesn't know.
    Files come and go where one node is alone."""

    def operations(self, length: int) -> list[Operation]:
        drawn: list[Operation] = []
        while len(drawn) < length:
            self._node = self._rng.randrange(SLOTS)
            self._together = self._rng.random() < 0.8
            self._weights = _SHARED_WEIGHTS if self._together else _OWN_WEIGHTS
            self._do(drawn, self._draw())
        return drawn

    def _place(self) -> str:
        return "/all" if self._together else f"/own{self._node}"


def _is_file(thing: Thing) -> bool:
    return isinstance(thing, File)


_QUIET: Final = (
    Kind.CREATE,
    Kind.WRITE,
    Kind.WRITE,
    Kind.RENAME,
    Kind.LINK,
    Kind.SYMLINK,
    Kind.TRUNCATE,
)
_WEIGHTS: Final = {
    Kind.CREATE: 16,
    Kind.WRITE: 12,
    Kind.APPEND: 8,
    Kind.TRUNCATE: 8,
    Kind.RENAME: 12,
    Kind.LINK: 3,
    Kind.UNLINK: 12,
    Kind.MKDIR: 5,
    Kind.RMDIR: 4,
    Kind.SYMLINK: 3,
    Kind.HOLD: 12,
    Kind.FSYNC: 9,
    Kind.SYNC: 2,
    Kind.READ: 8,
    Kind.LIST: 3,
}
_SHARED_WEIGHTS: Final = {
    Kind.READ: 50,
    Kind.WRITE: 16,
    Kind.APPEND: 10,
    Kind.TRUNCATE: 6,
    Kind.FSYNC: 6,
    Kind.SYNC: 3,
}
_OWN_WEIGHTS: Final = {
    Kind.UNLINK: 6,
    Kind.CREATE: 2,
    Kind.WRITE: 4,
    Kind.TRUNCATE: 2,
    Kind.HOLD: 3,
    Kind.READ: 6,
}
