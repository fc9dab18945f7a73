"""Guessing the names of kernel objects: segments in /dev/shm, queues in /dev/mqueue.

Tries: list both folders, open everything whose name says that it is the cluster's, and look for a
victim's pages in it; open queues under names that are guessed.

Stopped by: random names, which are removed once both sides have what they stand for; the jail,
which opens no file; objects of another user.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import posix_ipc

from guests.adversaries.raw import page_of
from guests.adversary import Cell

_FOLDERS = ("/dev/shm", "/dev/mqueue")
_GUESSES = 64


def run(cell: Cell) -> Iterator[None]:
    """Parameters: cluster, owner, ino, version; guesses."""
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    ino = cell.count("ino", 7, 0, 2**63)
    secret = page_of(cell.text("owner"), ino, cell.count("version", 1, 0, 2**32), 0)
    cluster = cell.text("cluster")
    guesses = cell.count("guesses", _GUESSES, 1, 10**6)
    for folder in _FOLDERS:
        try:
            names = [name for name in os.listdir(folder) if cluster in name]
        except FileNotFoundError:
            continue
        except OSError as error:
            refuse(cell, error)
            continue
        for name in names:
            report["attempts"] += 1
            if _holds(cell, f"{folder}/{name}", secret):
                report["succeeded"] += 1
        yield
    for _ in range(guesses):
        guess = f"/tmem-{cluster}-{cell.random.getrandbits(64):016x}"
        try:
            posix_ipc.MessageQueue(guess).close()
        except (posix_ipc.Error, OSError):
            # Names are drawn from 2**64: nothing to catch, it was never there.
            report["guesses"] = report.get("guesses", 0) + 1
        else:
            report["attempts"] += 1
            report["succeeded"] += 1


def _holds(cell: Cell, path: str, secret: bytes) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        refuse(cell, error)
        return False
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
            return memory.find(secret) >= 0
    except (OSError, ValueError):
        return False
    finally:
        os.close(fd)


def refuse(cell: Cell, error: OSError, *, attempted: bool = True) -> None:
    """One attempt was refused with an errno."""
    report = cell.report
    report["attempts"] += attempted
    report["caught"] += 1
    what = os.strerror(error.errno or 0).lower()
    report["reasons"][what] = report["reasons"].get(what, 0) + 1
