"""`tmem logs -f` over a log that is cut while it is followed."""

from __future__ import annotations

from pathlib import Path

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
