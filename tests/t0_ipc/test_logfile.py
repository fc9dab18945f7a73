"""The log of a process: lines that last, in a file that does not grow for ever."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ipc.logfile import LogFile


def _logger(path: Path, bytes_max: int) -> tuple[logging.Logger, LogFile]:
    handler = LogFile(path, bytes_max)
    logger = logging.getLogger(f"tests.{path}.{bytes_max}.{id(handler)}")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return logger, handler


def test_a_log_is_bounded_and_keeps_the_newest_lines(tmp_path: Path) -> None:
    """Whole lines, in order, up to the last one."""
    path = tmp_path / "log"
    logger, handler = _logger(path, 1000)

    for number in range(500):
        logger.info("line %d", number)
        assert path.stat().st_size <= 1000
    handler.close()

    lines = path.read_text().splitlines()
    numbers = [int(line.removeprefix("line ")) for line in lines]
    assert numbers == list(range(numbers[0], 500))
    assert len(path.read_bytes()) > 300


def test_a_log_goes_on_where_it_was(tmp_path: Path) -> None:
    """A process that is started again writes behind what was there, and counts it."""
    path = tmp_path / "log"
    for start in (0, 40):
        logger, handler = _logger(path, 500)
        for number in range(start, start + 40):
            logger.info("line %d", number)
        handler.close()

    assert path.stat().st_size <= 500
    assert path.read_text().splitlines()[-1] == "line 79"


def test_a_line_longer_than_the_log_harms_nothing(tmp_path: Path) -> None:
    """It stays until the next one comes."""
    logger, handler = _logger(tmp_path / "log", 500)

    logger.info("x" * 2000)
    logger.info("after")
    handler.close()

    assert (tmp_path / "log").read_text() == "after\n"


def test_a_log_needs_no_second_file(tmp_path: Path) -> None:
    """Nor its path: a process in a jail has only the descriptor."""
    path = tmp_path / "log"
    logger, handler = _logger(path, 500)
    path.rename(tmp_path / "elsewhere")

    for number in range(100):
        logger.info("line %d", number)
    handler.close()

    assert [one.name for one in tmp_path.iterdir()] == ["elsewhere"]
    assert (tmp_path / "elsewhere").read_text().endswith("line 99\n")


def test_what_cant_be_written_is_one_complaint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error, as `logging` does it; the process goes on."""
    logger, handler = _logger(tmp_path / "log", 500)
    handler.close()

    logger.info("too late")

    assert "Logging error" in capsys.readouterr().err
