"""The logs of a cluster as one stream, each line behind the name of who wrote it.

A guest writes its log itself, and is hostile: its lines drive no terminal and pass for nobody
else's, and of a file that it has made longer than a log can be only the end is read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ipc.errors import ExitCode, OperatorError
from ipc.logfile import LOG_BYTES_MAX
from tools.answers import plain_text
from tools.rundir import ClusterDirectory

_LOOK_SECONDS: Final = 0.2


class LogReader:
    """Reads all logs, or the one of `name`; raises OperatorError for an unknown name."""

    def __init__(self, directory: ClusterDirectory, name: str | None) -> None:
        self._directory = directory
        self._name = name
        self._offsets: dict[Path, int] = {}
        known = sorted(path.stem for path in directory.logs.glob("*.log"))
        if name is not None and name not in known:
            raise OperatorError(
                f"there is no log of {name!r}; there are {', '.join(known)}", ExitCode.USAGE
            )

    def lines(self, *, follow: bool) -> Iterator[str]:
        """Lines so far, by process; with `follow`, new ones until the cluster has ended."""
        while True:
            record = self._directory.read()
            lives = record is not None and record.lives
            yield from self._new_lines()
            if not follow or not lives:
                return
            time.sleep(_LOOK_SECONDS)

    def _new_lines(self) -> Iterator[str]:
        pattern = "*.log" if self._name is None else f"{self._name}.log"
        paths = sorted(self._directory.logs.glob(pattern))
        width = max((len(path.stem) for path in paths), default=0)
        for path in paths:
            with path.open("rb") as file:
                # One that was cut meanwhile (`ipc.logfile`) goes on where it now ends.
                end = file.seek(0, os.SEEK_END)
                start = max(min(self._offsets.get(path, 0), end), end - LOG_BYTES_MAX)
                file.seek(start)
                text = file.read(LOG_BYTES_MAX)
            # A line that is still being written waits for its end.
            whole = text[: text.rfind(b"\n") + 1]
            self._offsets[path] = start + len(whole)
            for line in whole.decode(errors="replace").split("\n")[:-1]:
                yield f"{path.stem:<{width}} | {plain_text(line)}"
