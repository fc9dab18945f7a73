"""Workloads: what the nodes do, drawn from a seed, and the volume that they find.

Most operations of a node are in a directory of its own, so that several journals are dirty at a
time; the others are where all nodes work, so that locks move and journals are written home.
"""

from __future__ import annotations

import functools
import random
from typing import Final

from fs.block.memory import MemoryDevice
from fs.directpages import DirectPages
from fs.ocfs2.filesystem import Ocfs2
from fs.ocfs2.mkfs import Parameters, blocks_needed, make_volume
from fs.vfs import Vfs
from tests.support.ocfs2 import Clock
from tests.t5_cluster.ocfs2.model import Directory, Effect, File, Model, Thing
from tests.t5_cluster.ocfs2.operations import Kind, Operation, perform
from tests.t5_cluster.ocfs2.world import SLOTS

ROOM_BLOCKS: Final = 600
PAGE: Final = 4096
SHARED: Final = ("/all", "/long")
LONG_NAME: Final = "n" * 200
LONG_NAMES: Final = 16
"""So many in a directory of one block: the next ones make it grow."""
OLD_FILES: Final = 4
HELD: Final = "held"


@functools.cache
def volume() -> tuple[MemoryDevice, Model]:
    """The volume from before the workload, and what it holds."""
    parameters = Parameters(SLOTS, b"sixteen bytes id", 7, 1_735_689_600)
    device = MemoryDevice.empty(blocks_needed(parameters) + ROOM_BLOCKS)
    make_volume(device, parameters, fresh=True)
    fs = Ocfs2(device, clock_ns=Clock())
    vfs = Vfs(fs, DirectPages(fs))
    model = Model()
    for number, operation in enumerate(_setup()):
        assert perform(vfs, {}, operation) is None
        # Numbers below zero: from before the workload.
        assert model.apply(-1 - number, operation).outcome is None
    vfs.unmount()
    return device, model


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
            for path in (f"{folder}/old{number}", f"{folder}/gap{number}"):
                data = rng.randbytes(rng.randrange(1, 3 * PAGE))
                made += [Operation(0, Kind.CREATE, path), Operation(0, Kind.WRITE, path, data=data)]
            gaps.append(Operation(0, Kind.UNLINK, path))
            if folder != "/all":
                made.append(Operation(0, Kind.MKDIR, f"{folder}/dir{number}"))
    return made + gaps


def workload(seed: int, length: int) -> list[Operation]:
    """All nodes come, do so many operations, and go."""
    order = [*range(SLOTS)]
    random.Random(seed).shuffle(order)
    return [
        *(Operation(node, Kind.JOIN) for node in order),
        *_Draw(seed).operations(length),
        *(Operation(node, Kind.LEAVE) for node in order),
    ]


class _Draw:
    """Draws operations that succeed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._model = volume()[1].copy()
        self._names = 0
        self._node = 0

    def operations(self, length: int) -> list[Operation]:
        drawn: list[Operation] = []
        while len(drawn) < length:
            if self._rng.random() < 0.4:
                self._node = self._rng.randrange(SLOTS)
            for operation in self._draw():
                effect = self._model.apply(len(drawn) + 1, operation)
                assert not isinstance(effect.outcome, int), str(operation)
                drawn.append(operation)
        return drawn

    def _draw(self) -> list[Operation]:
        rng, node = self._rng, self._node
        place = rng.choice(SHARED) if rng.random() < 0.35 else f"/own{node}"
        kind = rng.choices([*_WEIGHTS], weights=[*_WEIGHTS.values()])[0]
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
        if found is None:
            return []
        path, file = found
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
            case _:
                return [Operation(node, kind, path)]

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
        for _ in range(2):
            data = rng.randbytes(self._length())
            drawn.append(Operation(node, Kind.APPEND, new, data=data))
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
        return held

    def _length(self) -> int:
        rng = self._rng
        return rng.choice((rng.randrange(1, 600), rng.randrange(1, 3 * PAGE), PAGE, 12 * PAGE))

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


def _is_file(thing: Thing) -> bool:
    return isinstance(thing, File)


_WEIGHTS: Final = {
    Kind.CREATE: 16,
    Kind.WRITE: 12,
    Kind.APPEND: 8,
    Kind.TRUNCATE: 8,
    Kind.RENAME: 12,
    Kind.LINK: 3,
    Kind.UNLINK: 10,
    Kind.MKDIR: 5,
    Kind.RMDIR: 4,
    Kind.SYMLINK: 3,
    Kind.HOLD: 8,
    Kind.FSYNC: 9,
    Kind.SYNC: 2,
    Kind.READ: 8,
    Kind.LIST: 3,
}
