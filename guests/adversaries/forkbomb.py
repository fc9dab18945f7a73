"""Processes that start processes.

Tries: fork, and threads.  It stops at a small number and ends what it has started: what is shown is
that nothing else would have stopped it.

Stopped by: the jail: no system call that starts a process or a thread is in the filter, and
RLIMIT_NPROC is 1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from guests.adversaries.objectnames import refuse
from guests.adversary import Cell


def run(cell: Cell) -> Iterator[None]:
    """Parameters: most (it stops there)."""
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    children: list[int] = []
    most = cell.count("most", 6, 1, 16)
    yield
    try:
        for _ in range(most):
            try:
                pid = os.fork()
            except OSError as error:
                refuse(cell, error)
                continue
            if not pid:
                time.sleep(30)
                os._exit(0)
            children.append(pid)
            report["attempts"] += 1
            report["succeeded"] += 1
    finally:
        for pid in children:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    yield
    thread = threading.Thread(target=time.sleep, args=(0.01,))
    report["attempts"] += 1
    try:
        thread.start()
    except RuntimeError:
        report["caught"] += 1
        reasons = report["reasons"]
        reasons["can't start new thread"] = reasons.get("can't start new thread", 0) + 1
    else:
        thread.join()
        report["succeeded"] += 1
