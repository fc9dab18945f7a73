"""/proc, as far as it tells of others.

Tries: list the processes, read the memory, the maps, the environment and the command line of
another guest, list its descriptors and open what they stand for.

Stopped by: the jail, which opens no file; processes that are not dumpable, whose files in /proc are
root's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from guests.adversaries.objectnames import refuse
from guests.adversary import Cell

_FILES = ("environ", "root/etc/hostname", "fd/0", "fd/3", "fd/4", "fd/5", "maps", "mem")


def run(cell: Cell) -> Iterator[None]:
    """Parameters: pid of the victim."""
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    pid = cell.count("pid", 0, 1, 2**31)
    for folder in ("/proc", f"/proc/{pid}/fd", f"/proc/{pid}/task"):
        try:
            found = os.listdir(folder)
        except OSError as error:
            refuse(cell, error)
        else:
            report["attempts"] += 1
            report["succeeded"] += bool(found)
        yield
    address = 0
    for name in _FILES:
        try:
            fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            continue
        except OSError as error:
            refuse(cell, error)
        else:
            try:
                # What its descriptors lead to can be had once they are open; the rest is read.
                read = b"open" if name.startswith("fd/") else os.pread(fd, 64, address)
            finally:
                os.close(fd)
            if name == "maps":
                address = int(read.partition(b"-")[0], 16)
            report["attempts"] += 1
            report["succeeded"] += bool(read)
        yield
