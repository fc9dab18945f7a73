"""Passes 2 to 4: entries of directories, what is connected, names counted, orphans."""

from __future__ import annotations

import stat
from collections import Counter

from fs.block.device import BLOCK_BYTES
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.format import DIR_ENTRY, FILE_TYPES, dir_entry_bytes
from fs.ocfs2.fsck.volume import CheckedVolume, File

_ORPHAN_NAME_BYTES = 16


class Directories:
    """Reads all directories once, then compares."""

    def __init__(self, volume: CheckedVolume, orphan_dirs: dict[int, str]) -> None:
        self._volume = volume
        self._found = volume.found
        self._orphan_dirs = orphan_dirs
        self._names: Counter[int] = Counter()
        self._parents: dict[int, int] = {}
        """The directory that has the entry of a directory."""
        self._dotdot: dict[int, int] = {}
        self._orphans: dict[int, int] = {}

    def check(self) -> None:
        """All of it."""
        for ino, file in self._volume.files.items():
            if stat.S_ISDIR(file.mode):
                self._read(ino, file)
        self._check_connected()
        self._check_names()

    def _read(self, ino: int, file: File) -> None:
        names: set[bytes] = set()
        seen = 0
        for number, block in self._volume.blocks_of(file):
            if number * BLOCK_BYTES >= file.size:
                break
            seen = self._read_block(ino, number, self._volume.read(block), names, seen)

    def _read_block(
        self, ino: int, number: int, data: bytearray, names: set[bytes], seen: int
    ) -> int:
        """Entries of one block; `seen` counts those of the whole directory."""
        offset = 0
        place = f"directory {ino}"
        while offset < BLOCK_BYTES:
            where = f"{place}, block {number}, offset {offset}"
            room = BLOCK_BYTES - offset
            target, length, name_bytes, kind = (
                DIR_ENTRY.unpack_from(data, offset) if room >= DIR_ENTRY.size else (0, 0, 0, 0)
            )
            needed = dir_entry_bytes(name_bytes)
            if length % 4 or not DIR_ENTRY.size <= length <= room or (target and length < needed):
                self._found.add("DIRENT_LENGTH", where, f"an entry has a length of {length}.")
                break
            start = offset + DIR_ENTRY.size
            name = bytes(data[start : start + name_bytes])
            if seen < 2:
                self._dot(ino, where, seen, name, target, length)
            elif target:
                self._entry(ino, where, name, target, kind, names)
            seen += 1
            offset += length
        return seen

    def _dot(self, ino: int, where: str, seen: int, name: bytes, target: int, length: int) -> None:
        right = (b".", b"..")[seen]
        if name != right or not target:
            self._found.add("DIRENT_NOT_DOTTY", where, f"this is not the entry {right.decode()}.")
            if target and name:
                self._names[target] += 1
            return
        if seen == 0:
            if target != ino:
                self._found.add("DIRENT_DOT_INODE", where, f'"." is inode {target}.')
            if length != dir_entry_bytes(1):
                self._found.add("DIRENT_DOT_EXCESS", where, f'"." has a length of {length}.')
        else:
            self._dotdot[ino] = target
        self._names[target] += 1

    def _entry(
        self, ino: int, where: str, name: bytes, target: int, kind: int, names: set[bytes]
    ) -> None:
        volume = self._volume
        shown = name.decode("utf-8", "backslashreplace")
        if not name:
            self._found.add("DIRENT_ZERO", where, "an entry has no name.")
        elif name in (b".", b".."):
            self._found.add("DIRENT_DOTTY_DUP", where, f"there is a second {shown!r}.")
            return
        elif b"\0" in name or b"/" in name:
            self._found.add("DIRENT_NAME_CHARS", where, f"a name can't be {shown!r}.")
        if name in names:
            self._found.add("DIRENT_DUPLICATE", where, f"the name {shown!r} is there twice.")
        names.add(name)
        if not volume.is_block(target):
            self._found.add("DIRENT_INODE_RANGE", where, f"{shown!r} is inode {target}.")
            return
        file = volume.files.get(target)
        if file is None:
            self._found.add(
                "DIRENT_INODE_FREE", where, f"{shown!r} is inode {target}, which is not in use."
            )
            return
        right = FILE_TYPES.get(stat.S_IFMT(file.mode), 0)
        if kind != right:
            self._found.add(
                "DIRENT_TYPE", where, f"{shown!r} is said to be of kind {kind} and is {right}."
            )
        if ino in self._orphan_dirs:
            self._orphan(ino, where, shown, target)
            return
        self._names[target] += 1
        if not stat.S_ISDIR(file.mode):
            return
        if target in self._parents:
            self._found.add(
                "DIR_PARENT_DUP",
                where,
                f"directory {target} has a name in directory {self._parents[target]} already.",
            )
        else:
            self._parents[target] = ino

    def _orphan(self, ino: int, where: str, shown: str, target: int) -> None:
        volume, file = self._volume, self._volume.files[target]
        if target in self._orphans:
            self._found.add("DIRENT_DUPLICATE", where, f"orphan {target} is there twice.")
        self._orphans[target] = ino
        if shown != f"{target:0{_ORPHAN_NAME_BYTES}x}":
            self._found.add("DIRENT_NAME_CHARS", where, f"orphan {target} is called {shown!r}.")
        if stat.S_ISDIR(file.mode):
            self._names[ino] += 1
        if not file.flags & InodeFlag.ORPHANED:
            self._found.add("INODE_FLAGS", f"inode {target}", "it is not marked as an orphan.")
        volume.found.add(
            "INODE_ORPHANED",
            f"inode {target}",
            f"it waits in {self._orphan_dirs[ino]} to be freed.",
            pending=True,
        )

    def _check_connected(self) -> None:
        volume = self._volume
        top = {volume.super.root_block, volume.super.system_dir_block}
        for ino in top & self._parents.keys():
            parent = self._parents.pop(ino)
            self._found.add(
                "DIR_PARENT_DUP", f"directory {parent}", f"it has an entry for directory {ino}."
            )
        connected = top | self._orphans.keys()
        for ino, file in volume.files.items():
            if not stat.S_ISDIR(file.mode) or ino in self._orphans:
                continue
            path: set[int] = set()
            here: int | None = ino
            while here is not None and here not in connected and here not in path:
                path.add(here)
                here = self._parents.get(here)
            if path and here not in connected:
                self._found.add(
                    "DIR_NOT_CONNECTED", f"directory {ino}", "no way leads to it from the root."
                )
            # One line for each part that hangs loose.
            connected |= path
            parent = ino if ino in top else self._parents.get(ino, 0)
            dotdot = self._dotdot.get(ino)
            if parent and dotdot is not None and dotdot != parent:
                self._found.add(
                    "DIR_DOTDOT", f"directory {ino}", f'".." is {dotdot} and should be {parent}.'
                )

    def _check_names(self) -> None:
        top = (self._volume.super.root_block, self._volume.super.system_dir_block)
        for ino in self._orphans:
            # The directory that it was in does not count the ".." any more.
            self._names[self._dotdot.get(ino, 0)] -= 1
        for ino, file in self._volume.files.items():
            names = self._names[ino]
            place = f"inode {ino}"
            if ino in self._orphans:
                own = 1 if stat.S_ISDIR(file.mode) else 0
                if names > own:
                    self._found.add("INODE_COUNT", place, "it is an orphan, but has a name.")
                continue
            if file.flags & InodeFlag.ORPHANED:
                self._found.add("INODE_FLAGS", place, "it is marked as an orphan and is none.")
            if ino not in top and not (ino in self._parents if stat.S_ISDIR(file.mode) else names):
                if not stat.S_ISDIR(file.mode):
                    self._found.add("INODE_NOT_CONNECTED", place, "no directory has it.")
                continue
            if names != file.nlink:
                self._found.add(
                    "INODE_COUNT", place, f"it says {file.nlink} names, and has {names}."
                )
