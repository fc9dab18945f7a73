"""What the host's kernel has of a file: the file system that it is on, and pages in its page cache.

A guest's disk is a file, so the host caches it too unless it is told not to (`fs.block.direct`).
Whether that was obeyed is asked here and not believed: since Linux 6.6 even tmpfs, which is nothing
but page cache, takes O_DIRECT without a word.

Pages are counted by cachestat(2), Linux 6.5; older kernels have no figure (None).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final, NamedTuple

_CACHESTAT: Final = 451
"""The same number on every architecture but alpha."""
_IN_MEMORY: Final = ("tmpfs", "ramfs", "hugetlbfs", "rootfs")


class Backing(NamedTuple):
    """Where a file is: the device of the file system (`/dev/vda`), and its kind (`ext4`)."""

    device: str
    file_system: str

    @property
    def is_memory(self) -> bool:
        """Whether there is no disk below it."""
        return self.file_system in _IN_MEMORY

    def __str__(self) -> str:
        """As it is told to a person."""
        return f"{self.file_system} on {self.device}"


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Figures(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "in_writeback", "evicted", "recently_evicted")
    )


def backing(fd: int) -> Backing:
    """Of an open file; its mount is found by number, so bind mounts and the like are told right."""
    fields = dict(
        line.split(":\t", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    )
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # mount id, parent, device number, root, mount point, options... - kind, device, options
        mount, _, rest = line.partition(" - ")
        if mount.split(" ", 1)[0] == fields["mnt_id"].strip():
            kind, device, *_ = rest.split(" ")
            return Backing(device, kind)
    return Backing("unknown", "unknown")


def cached_pages(fd: int, length_bytes: int = 0) -> int | None:
    """Pages of an open file in the host's page cache: of its first so many bytes, 0 for all of it.

    None if this kernel can't say.
    """
    figures = _Figures()
    libc = ctypes.CDLL(None, use_errno=True)
    extent = _Range(0, length_bytes)
    if libc.syscall(_CACHESTAT, fd, ctypes.byref(extent), ctypes.byref(figures), 0):
        return None
    return int(figures.cached)


def cached_pages_of(path: str | os.PathLike[str]) -> int | None:
    """The same for a file by its path."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return cached_pages(fd)
    finally:
        os.close(fd)
