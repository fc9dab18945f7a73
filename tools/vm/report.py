"""What the machine told: steps and data on its second serial port, kernel messages on the first.

Everything in it may be wrong: the machine can die in the middle of a word, and names of files are
bytes that anyone may have chosen. Only a line that begins where a line is expected counts, and
data is taken by its length, so what stands in it can't pass for a step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

_LINE: Final = re.compile(rb"@ ([a-z][a-z-]*) (.*)")
_DATA: Final = re.compile(rb"@ data ([a-z][a-z-]*) (\d{1,10})")

KERNEL_TROUBLE: Final = re.compile(
    r"Kernel panic|BUG:|kernel BUG|Oops|general protection fault"
    r"|OCFS2: ERROR|\((?:mount|umount|ocfs2|o2hb|kworker|jbd2)[^)]*\):\w+:\d+ ERROR"
    r"|_\w+:\d+ ERROR|File system is now read-only|JBD2: .*[Ee]rror|I/O error"
)
"""Kernel messages that say that something is wrong with the image."""
KERNEL_NEWS: Final = re.compile(
    r"ocfs2: Mounting|replay journal|not unmounted cleanly|Waiting on dead"
)
"""Kernel messages that are worth showing."""


@dataclass
class Report:
    """Steps in their order, the last result of each, and the data by name."""

    order: list[str] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)

    @property
    def last_step(self) -> str:
        """The last thing that was told, with its result."""
        if not self.order:
            return "nothing"
        return f"{self.order[-1]}: {self.results[self.order[-1]]}"

    def is_ok(self, step: str) -> bool:
        """Whether a step was reached and went well."""
        return self.results.get(step) == "ok"

    def problem(self, step: str) -> str | None:
        """Why a step did not go well; None when it did."""
        result = self.results.get(step)
        if result == "ok":
            return None
        if result is None:
            return f"{step} was not reached (last step: {self.last_step})"
        if result == "started":
            return f"{step}: Linux hung or crashed here"
        return f"{step} {result}"


def parse(text: bytes) -> Report:
    """Take a report apart; what makes no sense is passed over."""
    report = Report()
    position = 0
    while position < len(text):
        end = text.find(b"\n", position)
        if end < 0:
            break
        line = text[position:end]
        position = end + 1
        if data := _DATA.fullmatch(line):
            size = int(data[2])
            if position + size <= len(text):  # otherwise the machine died while it told
                report.data[data[1].decode()] = text[position : position + size]
            position += size
        elif (told := _LINE.fullmatch(line)) and told[1] != b"data":
            step = told[1].decode()
            report.order.append(step)
            report.results[step] = told[2].decode(errors="replace")
    return report


def kernel_lines(console: bytes, pattern: re.Pattern[str]) -> list[str]:
    """The kernel messages that match."""
    lines = console.decode(errors="replace").replace("\r", "").splitlines()
    return [line for line in lines if pattern.search(line)]
