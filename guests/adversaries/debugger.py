"""Another guest's process, as a debugger sees it.

Tries: attach with ptrace, read its memory with process_vm_readv, send it signals.

Stopped by: the jail: the filter of system calls has none of these, processes are not dumpable, and
each guest is a user of its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator

from guests.adversaries.objectnames import refuse
from guests.adversary import Cell

_ATTACH = 16
_DETACH = 17


class _Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


def run(cell: Cell) -> Iterator[None]:
    """Parameters: pid of the victim."""
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    pid = cell.count("pid", 0, 1, 2**31)
    libc = ctypes.CDLL(None, use_errno=True)
    yield

    def note(result: int) -> None:
        if result >= 0:
            report["attempts"] += 1
            report["succeeded"] += 1
        else:
            refuse(cell, OSError(ctypes.get_errno(), ""))

    attached = libc.ptrace(_ATTACH, pid, None, None)
    note(attached)
    if attached >= 0:
        os.waitpid(pid, 0)
        libc.ptrace(_DETACH, pid, None, None)
    yield
    buffer = ctypes.create_string_buffer(64)
    ours = _Piece(ctypes.cast(buffer, ctypes.c_void_p), 64)
    # Where the same library lies in the other process, which the same fork server has started.
    theirs = _Piece(ctypes.cast(libc.getpid, ctypes.c_void_p), 64)
    read = libc.process_vm_readv(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
    note(read)
    yield
    for number in (0, signal.SIGCONT):
        try:
            os.kill(pid, number)
        except OSError as error:
            refuse(cell, error)
        else:
            report["attempts"] += 1
            report["succeeded"] += 1
