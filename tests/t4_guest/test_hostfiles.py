"""Files of the host that come with a question: what a guest in its jail can't open itself."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guests import keptfiles
from guests.control import DESCRIPTORS_MAX, Answers, Control
from ipc.codec import encode, receive_record
from tests.t4_guest.worlds import SMALL_MEMORY_BYTES, make_image, running_kernel
from tools.control import ask


class Guest:
    """A kernel and its control socket, served by the test itself."""

    def __init__(self, path: Path, answers: Answers) -> None:
        self.path = path
        self.control = Control(path, answers.answer)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """As a command asks, which takes the files along."""
        got: list[dict[str, Any]] = []
        asker = threading.Thread(target=lambda: got.append(ask(self.path, question)))
        asker.start()
        while asker.is_alive():
            self.control.wait(0.01)
        asker.join()
        return got[0]

    def serve(self) -> None:
        """Whatever is waiting, ends of connections included."""
        for _ in range(4):
            self.control.wait(0.01)

    def ask_raw(self, question: dict[str, Any], descriptors: list[int]) -> dict[str, Any] | None:
        """With whatever descriptors; None if the guest hangs up."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.path))
            socket.send_fds(connection, [encode(question)], descriptors)
            self.serve()
            return receive_record(connection)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    """A guest without work."""
    image = make_image(tmp_path / "image")
    with running_kernel(image, memory_bytes=SMALL_MEMORY_BYTES) as kernel:
        guest = Guest(tmp_path / "guest-g.sock", Answers(kernel))
        try:
            yield guest
        finally:
            guest.control.close()


def _question(**parameters: object) -> dict[str, Any]:
    return {"verb": "run", "workload": "histories", "seed": 1, "parameters": parameters}


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_record_is_written_though_its_path_is_gone(guest: Guest, tmp_path: Path) -> None:
    """What counts is the descriptor."""
    folder = tmp_path / "folder"
    folder.mkdir()
    before = _open_files()

    answer = guest.ask(_question(record=str(folder / "record"), prepare=1, operations=0))
    (folder / "record").rename(tmp_path / "moved")
    guest.serve()

    assert answer == {"accepted": True}
    assert (tmp_path / "moved").exists()
    assert _open_files() <= before + 1, "the record, until the work is done"


def test_a_file_that_cant_be_opened_is_the_guests_complaint(guest: Guest, tmp_path: Path) -> None:
    """Nothing is taken along, and the guest says which parameter is wrong."""
    question = {
        "verb": "run",
        "workload": "read_all",
        "seed": 1,
        "parameters": {"manifest": str(tmp_path / "absent")},
    }

    assert "absent" in guest.ask(question)["error"]


@pytest.mark.parametrize(
    ("names", "count"),
    [(["record"], 0), ([], 1), (["record", "record"], 2), (["record"], 2), ("record", 1), ([1], 1)],
)
def test_names_and_descriptors_must_agree(guest: Guest, names: object, count: int) -> None:
    """Else it is an error, and every descriptor is closed."""
    before = _open_files()
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        question = {**_question(record="/nowhere"), "files": names}
        answer = guest.ask_raw(question, [null] * count)
    finally:
        os.close(null)

    assert answer is not None
    assert ("error" in answer) == (bool(names) or bool(count))
    for _ in range(4):
        guest.control.wait(0.01)
    assert _open_files() == before


def test_more_descriptors_than_any_question_needs_end_the_connection(guest: Guest) -> None:
    """They don't stay open either."""
    before = _open_files()
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(guest.path))
            with contextlib.suppress(BrokenPipeError):
                for _ in range(4):
                    socket.send_fds(connection, [b"\1"], [null] * DESCRIPTORS_MAX)
                    guest.serve()
            assert connection.recv(1) == b""
    finally:
        os.close(null)
    guest.serve()

    assert _open_files() == before


def test_other_questions_close_what_comes_with_them(guest: Guest) -> None:
    """At once, and not only when the connection ends."""
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(guest.path))
            guest.serve()
            before = _open_files()
            for _ in range(3):
                socket.send_fds(connection, [encode({"verb": "status"})], [null, null])
                guest.serve()
                answer = receive_record(connection)
                assert answer is not None
                assert answer["state"] == "idle"
                assert _open_files() == before
    finally:
        os.close(null)


def test_kept_files_are_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the descriptor that was opened while that could be done."""
    path = tmp_path / "figures"
    path.write_text("one\n")
    assert keptfiles.read_text(str(path)) == "one\n"

    fd = os.open(path, os.O_RDONLY)
    monkeypatch.setitem(keptfiles._held, str(path), fd)
    try:
        path.write_text("another one\n")
        path.rename(tmp_path / "elsewhere")
        assert keptfiles.read_text(str(path)) == "another one\n"
    finally:
        os.close(fd)
