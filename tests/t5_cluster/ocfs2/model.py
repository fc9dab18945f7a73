"""What a volume may hold: directories, files and, for each sector of a file, its allowed contents.

An operation that is in the volume counts in full. One that may have got lost leaves a mark only
where it wrote into blocks that a file has all the same: there each sector may be old or new, since
file data is written in place and before the transaction that its operation belongs to.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.t5_cluster.ocfs2.operations import Kind, Operation

SECTOR = 512
PAGE = 4096
_ZEROS = frozenset((bytes(SECTOR),))

Sectors = list[frozenset[bytes]]


@dataclass(eq=False)
class File:
    """`number` is that of the operation that made it."""

    number: int
    size: int = 0
    sectors: Sectors = field(default_factory=list)
    """Of whole pages, with what each may hold."""
    links: int = 1

    def write(self, offset: int, data: bytes) -> None:
        """Exactly this is there now."""
        if not data:
            return
        end = offset + len(data)
        if offset > self.size:
            self._clear(self.size, offset)
        self._reach(end)
        for number in range(offset // SECTOR, -(-end // SECTOR)):
            self.sectors[number] = self._mixed(number, offset, data)
        self.size = max(self.size, end)

    def maybe_write(self, offset: int, data: bytes) -> None:
        """This may be there, as far as the file has pages."""
        end = min(offset + len(data), len(self.sectors) * SECTOR)
        for number in range(offset // SECTOR, -(-end // SECTOR)):
            self.sectors[number] |= self._mixed(number, offset, data)

    def truncate(self, size: int) -> None:
        """Cut, or filled with zeros."""
        if size > self.size:
            self._clear(self.size, size)
            self._reach(size)
        else:
            del self.sectors[-(-size // PAGE) * (PAGE // SECTOR) :]
        self.size = size

    def maybe_truncate(self, size: int) -> None:
        """The rest of the last page may be zeros."""
        self.maybe_write(size, bytes(-size % PAGE))

    def allows(self, content: bytes) -> bool:
        """Whether this may be read."""
        if len(content) != self.size:
            return False
        for number, allowed in enumerate(self.sectors[: -(-self.size // SECTOR)]):
            piece = content[number * SECTOR : (number + 1) * SECTOR]
            if piece not in allowed and (
                len(piece) == SECTOR or not any(one.startswith(piece) for one in allowed)
            ):
                return False
        return True

    def copy(self) -> File:
        """As it is now."""
        return File(self.number, self.size, list(self.sectors), self.links)

    def _reach(self, end: int) -> None:
        missing = -(-end // PAGE) * (PAGE // SECTOR) - len(self.sectors)
        self.sectors += [_ZEROS] * missing

    def _clear(self, start: int, end: int) -> None:
        """From the end of the file on it is zeros, whatever the last page held behind it."""
        length = min(-start % PAGE, end - start)
        for number in range(start // SECTOR, -(-(start + length) // SECTOR)):
            self.sectors[number] = self._mixed(number, start, bytes(length))

    def _mixed(self, number: int, offset: int, data: bytes) -> frozenset[bytes]:
        """A sector after `data` was written at `offset`."""
        start = number * SECTOR
        head, tail = max(offset - start, 0), min(offset + len(data) - start, SECTOR)
        new = data[start + head - offset : start + tail - offset]
        if len(new) == SECTOR:
            return frozenset((new,))
        return frozenset(old[:head] + new + old[tail:] for old in self.sectors[number])


@dataclass(eq=False)
class Link:
    """A symbolic link."""

    number: int
    target: str


@dataclass(eq=False)
class Directory:
    """Names."""

    number: int
    entries: dict[str, File | Link | Directory] = field(default_factory=dict)


Thing = File | Link | Directory


@dataclass
class Effect:
    """What one operation did, by numbers of things."""

    outcome: object = None
    """An error number, what was read (`File` or sorted names), or None."""
    touched: set[int] = field(default_factory=set)
    """Things whose locks it had."""
    changed: set[int] = field(default_factory=set)
    write: tuple[int, int, bytes] | None = None
    """File, offset, data written in place."""
    cut: tuple[int, int] | None = None
    """File and new size."""


class Model:
    """A tree and the handles that nodes hold."""

    def __init__(self) -> None:
        self.root = Directory(0)
        self.handles: dict[tuple[int, str], File] = {}
        self.files: dict[int, File] = {}

    def copy(self) -> Model:
        """The same, on its own; without handles."""
        made = Model()
        things: dict[int, Thing] = {}

        def again(thing: Thing) -> Thing:
            if thing.number in things:
                return things[thing.number]
            new: Thing
            match thing:
                case File():
                    new = thing.copy()
                    made.files[thing.number] = new
                case Link():
                    new = Link(thing.number, thing.target)
                case Directory():
                    new = Directory(thing.number)
                    new.entries = {name: again(one) for name, one in thing.entries.items()}
            things[thing.number] = new
            return new

        root = again(self.root)
        assert isinstance(root, Directory)
        made.root = root
        return made

    # Operations

    def apply(self, number: int, operation: Operation) -> Effect:
        """Do it; `number` is its place in the order of all."""
        effect = Effect()
        try:
            self._apply(number, operation, effect)
        except OSError as reason:
            effect.outcome = reason.errno
        return effect

    def maybe(self, effect: Effect) -> None:
        """It was done and may have got lost."""
        if effect.write is not None and (file := self.files.get(effect.write[0])):
            file.maybe_write(*effect.write[1:])
        if effect.cut is not None and (file := self.files.get(effect.cut[0])):
            file.maybe_truncate(effect.cut[1])

    def forget_handles(self, node: int) -> None:
        """A node is dead."""
        for key in [key for key in self.handles if key[0] == node]:
            del self.handles[key]

    def _apply(self, number: int, operation: Operation, effect: Effect) -> None:
        match operation.kind:
            case Kind.CREATE:
                self.files[number] = File(number)
                self._add(self.files[number], operation.path, effect)
            case Kind.MKDIR:
                self._add(Directory(number), operation.path, effect)
            case Kind.SYMLINK:
                self._add(Link(number, operation.target), operation.path, effect)
            case Kind.LINK:
                file = self._file(operation.path, effect)
                self._add(file, operation.target, effect)
                file.links += 1
            case Kind.UNLINK:
                self._remove(*self._place(operation.path, effect), effect)
            case Kind.RMDIR:
                self._rmdir(operation.path, effect)
            case Kind.RENAME:
                self._rename(operation, effect)
            case Kind.LIST:
                effect.outcome = sorted(self._walk(operation.path, effect).entries)
            case Kind.LEAVE:
                self.forget_handles(operation.node)
            case Kind.JOIN | Kind.SYNC:
                pass
            case _:
                self._apply_to_file(operation, effect)

    def _apply_to_file(self, operation: Operation, effect: Effect) -> None:
        held = operation.kind in (Kind.HELD_WRITE, Kind.HELD_FSYNC, Kind.RELEASE)
        file = self._held(operation, effect) if held else self._file(operation.path, effect)
        match operation.kind:
            case Kind.READ:
                effect.outcome = file.copy()
            case Kind.WRITE | Kind.HELD_WRITE:
                self._write(file, operation.offset, operation, effect)
            case Kind.APPEND:
                self._write(file, file.size, operation, effect)
            case Kind.TRUNCATE:
                effect.cut = file.number, operation.size
                effect.changed.add(file.number)
                file.truncate(operation.size)
            case Kind.HOLD:
                self.handles[operation.node, operation.target] = file
            case Kind.RELEASE:
                del self.handles[operation.node, operation.target]

    def _add(self, thing: Thing, path: str, effect: Effect) -> None:
        directory, name = self._place(path, effect)
        if name in directory.entries:
            raise OSError(errno.EEXIST, path)
        directory.entries[name] = thing
        effect.changed |= {directory.number, thing.number}

    def _rmdir(self, path: str, effect: Effect) -> None:
        directory, name = self._place(path, effect)
        found = self._find(directory, name, effect)
        assert isinstance(found, Directory)
        if found.entries:
            raise OSError(errno.ENOTEMPTY, path)
        del directory.entries[name]
        effect.changed |= {directory.number, found.number}

    def _write(self, file: File, offset: int, operation: Operation, effect: Effect) -> None:
        effect.write = file.number, offset, operation.data
        effect.changed.add(file.number)
        file.write(offset, operation.data)

    def _rename(self, operation: Operation, effect: Effect) -> None:
        old, old_name = self._place(operation.path, effect)
        new, new_name = self._place(operation.target, effect)
        thing = self._find(old, old_name, effect)
        replaced = new.entries.get(new_name)
        if replaced is thing:
            return
        if replaced is not None:
            self._remove(new, new_name, effect)
        del old.entries[old_name]
        new.entries[new_name] = thing
        effect.changed |= {old.number, new.number, thing.number}

    def _remove(self, directory: Directory, name: str, effect: Effect) -> None:
        found = self._find(directory, name, effect)
        assert not isinstance(found, Directory)
        del directory.entries[name]
        if isinstance(found, File):
            found.links -= 1
        effect.changed |= {directory.number, found.number}

    # Paths

    def _walk(self, path: str, effect: Effect) -> Directory:
        directory = self.root
        effect.touched.add(0)
        for name in path.strip("/").split("/") if path.strip("/") else ():
            found = self._find(directory, name, effect)
            assert isinstance(found, Directory)
            directory = found
        return directory

    def _place(self, path: str, effect: Effect) -> tuple[Directory, str]:
        parent, _, name = path.rpartition("/")
        return self._walk(parent, effect), name

    def _find(self, directory: Directory, name: str, effect: Effect) -> Thing:
        found = directory.entries.get(name)
        if found is None:
            raise OSError(errno.ENOENT, name)
        effect.touched.add(found.number)
        return found

    def _file(self, path: str, effect: Effect) -> File:
        found = self._find(*self._place(path, effect), effect)
        assert isinstance(found, File)
        return found

    def _held(self, operation: Operation, effect: Effect) -> File:
        file = self.handles.get((operation.node, operation.target))
        if file is None:
            raise OSError(errno.EBADF, operation.target)
        effect.touched.add(file.number)
        return file

    # Looking at it

    def walk(self) -> Iterator[tuple[str, Thing]]:
        """All paths."""
        pending: list[tuple[str, Thing]] = [("/", self.root)]
        while pending:
            path, thing = pending.pop()
            yield path, thing
            if isinstance(thing, Directory):
                top = path.rstrip("/")
                pending += [(f"{top}/{name}", one) for name, one in thing.entries.items()]

    def shape(self) -> frozenset[tuple[str, object]]:
        """Paths, kinds, sizes and targets."""
        return frozenset((path, _shape(thing)) for path, thing in self.walk())

    def contents_differ(self, contents: dict[str, bytes]) -> str | None:
        """A path whose content can't be, if the shape is right."""
        for path, thing in self.walk():
            if isinstance(thing, File) and not thing.allows(contents[path]):
                return path
        return None


def _shape(thing: Thing) -> object:
    match thing:
        case File():
            return thing.size
        case Link():
            return thing.target
        case Directory():
            return None
