"""Replies that are never read.

Tries: send calls into the request queue and leave every answer in the reply queue, so that the
hypervisor has nowhere to put the next one and waits, and with it everybody.

Stopped by: the hypervisor waits for no guest (`ipc.mqueue`): a reply that finds the queue full is
dropped and counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import posix_ipc

from guests.adversaries.raw import Raw
from guests.adversary import Cell
from ipc.abi import Op
from ipc.mqueue import QueueChannel


def run(cell: Cell) -> Iterator[None]:
    """Parameters: seconds."""
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0}
    channel = raw.channel
    assert isinstance(channel, QueueChannel)
    # The queue below the channel, whose `call` would wait for the answer.
    requests = channel._requests  # noqa: SLF001
    until = time.monotonic() + cell.number("seconds", 2.0, 0.01, 600.0)
    yield
    while time.monotonic() < until:
        try:
            requests.send(raw.request(Op.VERSION), 0.05)
        except posix_ipc.BusyError:
            yield
        else:
            report["attempts"] += 1
        if report["attempts"] % 32 == 0:
            yield
