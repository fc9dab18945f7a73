"""Message queues, of which the machine has few.

Tries: make queues of its own.  The kernel counts their bytes for each user and their number for all
(256), so who makes many keeps other guests from attaching.

Stopped by: the jail: `mq_open` with O_CREAT is not in the filter, and RLIMIT_MSGQUEUE is 0.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import posix_ipc

from guests.adversaries.objectnames import refuse
from guests.adversary import Cell


def run(cell: Cell) -> Iterator[None]:
    """Parameters: most (it stops there, and removes them)."""
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    most = cell.count("most", 6, 1, 10)
    made = []
    yield
    try:
        for number in range(most):
            name = f"/tmem-hoard-{cell.spec.name}-{cell.random.getrandbits(48):x}-{number}"
            try:
                queue = posix_ipc.MessageQueue(
                    name, posix_ipc.O_CREX, max_messages=2, max_message_size=64
                )
            except posix_ipc.PermissionsError:
                refuse(cell, OSError(errno.EPERM, ""))
            except OSError as error:
                refuse(cell, error)
            else:
                made.append(queue)
                report["attempts"] += 1
                report["succeeded"] += 1
            yield
    finally:
        for queue in made:
            queue.unlink()
            queue.close()
