"""`tmem logs` over a log that is cut while it is followed, and over one of a hostile guest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.logs import LogReader
from tools.rundir import ClusterDirectory


def test_a_log_that_was_cut_is_followed_on(tmp_path: Path) -> None:
    """What is written after the cut is shown, and nothing twice."""
    directory = ClusterDirectory(tmp_path)
    directory.logs.mkdir()
    log = directory.log("red")
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    reader = LogReader(directory, None)
    assert len(list(reader.lines(follow=False))) == 100

    log.write_text("line 99\n")
    assert list(reader.lines(follow=False)) == []
    with log.open("a") as file:
        file.write("line 100\nhalf a line")

    assert list(reader.lines(follow=False)) == ["red | line 100"]


def test_lines_of_a_hostile_guest_drive_no_terminal(tmp_path: Path) -> None:
    """Nor does one of them look like two, or like another process's."""
    directory = ClusterDirectory(tmp_path)
    directory.logs.mkdir()
    lines = [
        b"\x1b]0;owned\x07\x1b[2J",
        b"a\rsupervisor | b",
        "\u202e\x85\u2028".encode(),
        b"\xff\t.",
    ]
    directory.log("red").write_bytes(b"\n".join(lines) + b"\n")

    shown = list(LogReader(directory, None).lines(follow=False))

    assert shown == [
        "red | ?]0;owned??[2J",
        "red | a?supervisor | b",
        "red | ???",
        "red | \ufffd\t.",
    ]


def test_of_a_log_that_is_longer_than_a_log_the_end_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest can make its own as long as its disk is, without taking room for it."""
    monkeypatch.setattr("tools.logs.LOG_BYTES_MAX", 4096)
    directory = ClusterDirectory(tmp_path)
    directory.logs.mkdir()
    log = directory.log("red")
    with log.open("wb") as file:
        file.write(b"old\n")
        file.truncate(1 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b"\nnew\n")

    garbage, new = LogReader(directory, None).lines(follow=False)

    assert len(garbage) < 4096 + len("red | ")
    assert new == "red | new"
