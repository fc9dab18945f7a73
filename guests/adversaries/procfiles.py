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

_FILES = ("mem", "maps", "environ", "fd/0", "fd/3", "fd/4", "fd/5", "root/etc/hostname")


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
    for name in _FILES:
        try:
            fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            continue
        except OSError as error:
            refuse(cell, error)
        else:
            os.close(fd)
            report["attempts"] += 1
            report["succeeded"] += 1
        yield
