"""Vandalism: bytes changed in the memory itself, past the hypervisor.

Tries: find the arena among the objects in /dev/shm, or among the descriptors of other processes in
/proc, map it, and change a byte in each page that it finds of another guest.  No call is made, so
no right of any pool is asked.

Stopped by: the jail (another user's object, which can't be opened, and no `openat` besides);
checksums of pages (`hypervisor.beside`) find what was changed all the same.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

from guests.adversaries.raw import page_of
from guests.adversary import Cell
from ipc.abi import PAGE_BYTES

_FOLDER = "/dev/shm"


def run(cell: Cell) -> Iterator[None]:
    """Parameters: cluster (part of the names of its objects), segment (the name of one, as if it
    had guessed it), and owner, ino, version, pages of what to look for, as `witness` names them."""
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    owner, ino = cell.text("owner"), cell.count("ino", 7, 0, 2**63)
    version, pages = cell.count("version", 1, 0, 2**32), cell.count("pages", 32, 1, 65536)
    cluster, segment = cell.text("cluster"), cell.text("segment", "")
    yield
    try:
        names = [name for name in os.listdir(_FOLDER) if cluster in name]
    except OSError as error:
        _refused(cell, error)
        # It may have been told the name, or have guessed it.
        names = [segment]
    for name in names:
        try:
            fd = os.open(f"{_FOLDER}/{name}", os.O_RDWR)
        except OSError as error:
            _refused(cell, error)
            continue
        with mmap.mmap(fd, 0) as arena:
            os.close(fd)
            for index in range(pages):
                at = arena.find(page_of(owner, ino, version, index))
                if at >= 0:
                    arena[at + PAGE_BYTES // 2] ^= 0xFF
                    report["attempts"] += 1
                    report["succeeded"] += 1
        yield


def _refused(cell: Cell, error: OSError) -> None:
    cell.report["attempts"] += 1
    cell.report["caught"] += 1
    what = os.strerror(error.errno or 0).lower()
    cell.report["reasons"][what] = cell.report["reasons"].get(what, 0) + 1
