"""The doorman: what ends the server's wait in its favourite's queue."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest

from hypervisor import doorman
from hypervisor.doorman import Doorman
from ipc.abi import REQUEST_BYTES
from ipc.mqueue import QueuePair
from ipc.names import Registry
from ipc.window import create_window

_LONG_SECONDS = 60.0


@pytest.fixture
def favourite(tmp_path: Path, cluster_name: str) -> Iterator[QueuePair]:
    """The queues of a guest."""
    made = QueuePair(cluster_name, Registry(tmp_path), create_window(), os.urandom)
    yield made
    made.close()


def test_a_call_is_received_and_nobody_waits(favourite: QueuePair) -> None:
    """What the server is there for."""
    queue = posix_ipc.MessageQueue(favourite.request_name, read=False)
    standing = Doorman()
    standing.register(favourite.fileno(), select.EPOLLIN)
    standing.favour(favourite)
    queue.send(bytes(REQUEST_BYTES))
    assert favourite.wait() == bytes(REQUEST_BYTES)
    assert not standing.somebody_waits
    standing.unfavour()
    standing.close()
    queue.close()


@pytest.mark.parametrize("somebody", [False, True])
def test_the_wait_for_a_silent_favourite_ends(
    favourite: QueuePair, monkeypatch: pytest.MonkeyPatch, somebody: bool
) -> None:
    """Because somebody else wants something, or after a while: the server has other duties."""
    monkeypatch.setattr(doorman, "_ROUND_SECONDS", _LONG_SECONDS if somebody else 0.001)
    reader, writer = os.pipe()
    standing = Doorman()
    for fd in (favourite.fileno(), reader):
        standing.register(fd, select.EPOLLIN)
    standing.favour(favourite)
    if somebody:
        os.write(writer, b"!")
    assert favourite.wait(_LONG_SECONDS / 2) is None
    assert standing.somebody_waits
    standing.unfavour()
    assert [fd for fd, _ in standing.poll(0)] == ([reader] if somebody else [])
    standing.close()
    os.close(reader)
    os.close(writer)
