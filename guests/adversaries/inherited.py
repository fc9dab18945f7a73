"""What was open before: descriptors that the starter of a guest had, and its children have.

Tries: find, among its descriptors, pipes to processes outside (one byte into that of the fork
server ends it, and all its children pass for dead), the console, in which it writes a line as if it
were the hypervisor, and an input, which may be the terminal of whoever started the cluster.

Stopped by: the jail closes all that this process has not opened itself (`ipc.jail.descriptors`).
No byte is written into a pipe here: without the jail that would be the end of the other guests.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from guests.adversary import Cell

_DESCRIPTORS = 256
_NOTHING = "nothing of the kind is open"
_NULL = os.makedev(1, 3)
_FORGED = b"hypervisor: all is well (says mallory)\n"


def run(cell: Cell) -> Iterator[None]:
    """No parameters."""
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    found = dict(_open())
    pipes = [fd for fd, one in found.items() if fd > 2 and stat.S_ISFIFO(one.st_mode)]
    _count(cell, pipes)
    yield
    mine = {one.st_ino for fd, one in found.items() if fd > 2}
    consoles = [fd for fd in (1, 2) if fd in found and found[fd].st_ino not in mine]
    for fd in consoles:
        os.write(fd, _FORGED)
    _count(cell, consoles)
    yield
    _count(cell, [0] if 0 in found and found[0].st_rdev != _NULL else [])


def _open() -> Iterator[tuple[int, os.stat_result]]:
    for fd in range(_DESCRIPTORS):
        try:
            yield fd, os.fstat(fd)
        except OSError:
            continue


def _count(cell: Cell, found: Sequence[int]) -> None:
    cell.report["attempts"] += max(1, len(found))
    cell.report["succeeded"] += len(found)
    if not found:
        cell.report["caught"] += 1
        cell.report["reasons"][_NOTHING] = cell.report["reasons"].get(_NOTHING, 0) + 1
