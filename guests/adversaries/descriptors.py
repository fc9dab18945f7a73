"""Descriptors, until there are no more.

Tries: duplicate descriptors and open pipes and sockets without closing any, with the limit set as
high as it lets itself be set.

Stopped by: the jail: at most `guests.jail.FILES_MAX` descriptors, a limit that can't be raised, and
no pipes; what a guest uses up is its own.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

from guests.adversaries.objectnames import refuse
from guests.adversary import Cell


def run(cell: Cell) -> Iterator[None]:
    """Parameters: most (it stops there), fair (as many nobody minds)."""
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    most, fair = cell.count("most", 4096, 1, 10**5), cell.count("fair", 256, 1, 10**5)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most * 2, most * 2))
    except (OSError, ValueError):
        report["attempts"] += 1
        report["caught"] += 1
        report["reasons"]["limit can't be raised"] = 1
    yield
    opened: list[int] = []
    # Their numbers are enough to see how many there are; it holds them itself.
    try:
        while len(opened) < most:
            try:
                opened.append(os.dup(0))
            except OSError as error:
                refuse(cell, error)
                break
            if len(opened) % 64 == 0:
                yield
        report["opened"] = len(opened)
        report["attempts"] += len(opened)
        report["succeeded"] += max(0, len(opened) - fair)
    finally:
        for fd in opened:
            os.close(fd)
