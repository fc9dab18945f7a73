"""Names found before, so that a path walk needn't search directories again."""

from __future__ import annotations

from collections import OrderedDict

from fs.hooks import FileKey


class NameCache:
    """At most `capacity` names, the least recently used one leaves first.

    Directories are named with their generation, so the names of a removed directory can't be
    found in a later one with its number.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._names: OrderedDict[tuple[FileKey, bytes], int] = OrderedDict()

    def get(self, directory: FileKey, name: bytes) -> int | None:
        """The inode number, or None when the directory has to be searched."""
        found = self._names.get((directory, name))
        if found is not None:
            self._names.move_to_end((directory, name))
        return found

    def put(self, directory: FileKey, name: bytes, ino: int) -> None:
        """Remember a name that is in the directory now."""
        self._names[directory, name] = ino
        self._names.move_to_end((directory, name))
        if len(self._names) > self._capacity:
            self._names.popitem(last=False)

    def drop(self, directory: FileKey, name: bytes) -> None:
        """The name is gone or means something else."""
        self._names.pop((directory, name), None)
