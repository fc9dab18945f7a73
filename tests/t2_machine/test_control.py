"""The administrator's socket by itself: answers longer than a socket has room for, a deaf asker."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor.control import Control
from ipc.attach import CONTROL_SOCKET
from ipc.codec import decode, encode, split_frame

LONG = b"x" * 2_000_000
ROUNDS_MAX = 10_000


class Desk:
    """A control socket whose every answer is long, and somebody who asks there."""

    def __init__(self, folder: Path) -> None:
        poll: Any = select.epoll()
        self.poll = poll
        self.handlers: dict[int, Callable[[], None]] = {}
        self.answers = 0
        self.control = Control(folder, poll, self.handlers, self.answer, lambda *_: None)
        self.asker = socket.socket(socket.AF_UNIX)
        self.asker.connect(str(folder / CONTROL_SOCKET))
        self.asker.setblocking(False)
        self.received = b""

    def answer(self, record: dict[str, Any]) -> dict[str, Any]:
        self.answers += 1
        return {"number": record["number"], "long": LONG}

    def serve(self) -> bool:
        """One round; whether there was anything to do."""
        ready = self.poll.poll(0)
        for fd, _ in ready:
            self.handlers[fd]()
        return bool(ready)

    def hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.received += self.asker.recv(1 << 18)

    def next_answer(self) -> dict[str, Any]:
        """Ask for rounds and read, until an answer is whole."""
        for _ in range(ROUNDS_MAX):
            frame = split_frame(self.received)
            if frame is not None:
                body, self.received = frame
                return decode(body)
            self.serve()
            self.hear()
        raise AssertionError("no answer")


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """Open until the end of a test."""
    desk = Desk(tmp_path)
    try:
        yield desk
    finally:
        desk.asker.close()
        desk.control.close()
        desk.poll.close()


def test_an_answer_that_is_longer_than_a_socket_has_room_for_comes_whole(desk: Desk) -> None:
    """And so does the next one."""
    for number in range(2):
        desk.asker.send(encode({"number": number}))
        assert desk.next_answer() == {"number": number, "long": LONG}


def test_of_a_deaf_asker_one_answer_is_kept(desk: Desk) -> None:
    """However much it asks, and nobody is kept busy; it gets all answers when it listens."""
    desk.asker.send(b"".join(encode({"number": number}) for number in range(5)))
    rounds = 0
    while desk.serve():
        rounds += 1
        assert rounds < 100, "there is always something to do"
    assert desk.answers == 1

    assert [desk.next_answer()["number"] for _ in range(5)] == [0, 1, 2, 3, 4]


def test_an_event_of_an_earlier_connection_drops_nobody(desk: Desk) -> None:
    """Its descriptor has been closed and used again in one round."""
    while desk.serve():
        pass
    (serve,) = list(desk.handlers.values())[1:]
    serve()
    desk.asker.send(encode({"number": 7}))
    assert desk.next_answer()["number"] == 7


def test_an_asker_that_goes_away_in_the_middle_is_forgotten(desk: Desk) -> None:
    """With what was left of its answer."""
    desk.asker.send(encode({"number": 0}))
    desk.serve()
    desk.serve()
    before = len(desk.handlers)
    desk.asker.close()
    while desk.serve():
        pass
    assert len(desk.handlers) == before - 1
