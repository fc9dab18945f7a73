"""Games with the window: the memory that the guest shares with the hypervisor.

Tries: write random bytes over all words of the ring and of the shared info, while calls are posted
and answered, change a batch table and pages while they are read, and cut the window off under the
hypervisor.

Stopped by: everything is copied out once and then checked; no word that the hypervisor has written
is read back; the window is sealed, so it can't shrink.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from guests.adversaries.objectnames import refuse
from guests.adversaries.raw import Raw
from guests.adversary import Cell
from ipc.abi import PAGE_BYTES, Op
from ipc.limits import WINDOW_BYTES
from ipc.mqueue import KICK, QueueChannel


def run(cell: Cell) -> Iterator[None]:
    """Parameters: seconds."""
    raw = Raw(cell)
    report = cell.report
    report |= {"attempts": 0, "succeeded": 0, "caught": 0, "reasons": {}}
    channel = raw.channel
    assert isinstance(channel, QueueChannel)
    window = channel.window
    pool = raw.new_pool().value
    fd = _window_descriptor()
    if fd is not None:
        for size_bytes in (0, PAGE_BYTES):
            try:
                os.ftruncate(fd, size_bytes)
            except OSError as error:
                refuse(cell, error)
            else:
                report["attempts"] += 1
                report["succeeded"] += 1
    until = time.monotonic() + cell.number("seconds", 1.0, 0.01, 600.0)
    views = (window.call_words, window.completion_words)
    requests = channel._requests  # noqa: SLF001
    while time.monotonic() < until:
        for words in views:
            for place in range(len(words)):
                words[place] = cell.random.getrandbits(64)
        window.request[:] = raw.request(
            cell.random.choice(tuple(Op)), pool=pool, oid=cell.random.getrandbits(8), count=1
        )
        window.table[:] = cell.random.randbytes(len(window.table))
        window.call_words[0] = cell.random.getrandbits(64)
        try:
            requests.send(KICK, 0)
        except Exception:  # noqa: BLE001
            # Its queue is full: the hypervisor has enough to do.
            yield
        report["attempts"] += 1
        if report["attempts"] % 32 == 0:
            yield


def _window_descriptor() -> int | None:
    """By its size: in the jail it can't read what its descriptors are."""
    for fd in range(3, 256):
        try:
            if os.fstat(fd).st_size == WINDOW_BYTES:
                return fd
        except OSError:
            continue
    return None
