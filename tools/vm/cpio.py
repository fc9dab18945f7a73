"""The `newc` form of a cpio archive, which Linux unpacks as its first root file system.

A header of 110 ASCII bytes, the name with a NUL, the data; name and data are padded to four bytes
(Linux's Documentation/driver-api/early-userspace/buffer-format.rst). Everything belongs to root
and has the time 0, so equal contents give equal archives.
"""

from __future__ import annotations

import stat
from typing import Final

_MAGIC: Final = b"070701"
_TRAILER: Final = "TRAILER!!!"
NAME_BYTES_MAX: Final = 4095
DATA_BYTES_MAX: Final = 0xFFFFFFFF


class Archive:
    """An archive that grows by one entry at a time. Folders above an entry come by themselves."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._names: set[str] = set()

    def folder(self, path: str) -> None:
        """A directory; nothing happens when it is there already."""
        path = path.strip("/")
        if path and path not in self._names:
            self._add(path, stat.S_IFDIR | 0o755, b"", links=2)

    def file(self, path: str, data: bytes, *, executable: bool = False) -> None:
        """A regular file."""
        self._add(path.strip("/"), stat.S_IFREG | (0o755 if executable else 0o644), data)

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._add(path.strip("/"), stat.S_IFLNK | 0o777, target.encode())

    def finish(self) -> bytes:
        """The whole archive."""
        return b"".join([*self._pieces, _entry(0, _TRAILER, 0, b"", 1)])

    def _add(self, path: str, mode: int, data: bytes, links: int = 1) -> None:
        if not path or path in self._names or path == _TRAILER:
            raise ValueError(f"{path!r} can't be an entry, or is one already")
        parent = path.rpartition("/")[0]
        if parent:
            self.folder(parent)
        self._names.add(path)
        self._pieces.append(_entry(len(self._names), path, mode, data, links))


def _entry(number: int, path: str, mode: int, data: bytes, links: int) -> bytes:
    name = path.encode() + b"\0"
    if len(name) > NAME_BYTES_MAX + 1 or len(data) > DATA_BYTES_MAX:
        raise ValueError(f"{path[:40]!r}... does not fit the format")
    owner = group = mtime = 0
    device = (0, 0, 0, 0)
    checksum = 0  # of the `crc` form only
    fields = (number, mode, owner, group, links, mtime, len(data), *device, len(name), checksum)
    head = _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
