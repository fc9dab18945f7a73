"""Pressure stall information: the share of time in which work waits for memory.

As Linux's PSI counts it: `some` while at least one program waits, `full` while all that could run
do.  A guest has one processor, so whoever waits is the one that runs; the others, if there are any,
could run as well.  Averages are over 10, 60 and 300 seconds, updated every 2 seconds, with Linux's
factors (exp(-2/n)).

    some avg10=0.00 avg60=0.00 avg300=0.00 total=0      /proc/pressure/memory
    full avg10=0.00 avg60=0.00 avg300=0.00 total=0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

PERIOD_NS: Final = 2_000_000_000
WINDOWS_SECONDS: Final = (10, 60, 300)
_PERIODS_MAX: Final = 1000
"""After so many without a look, an average is what it was in none of them."""


class _Share:
    """Waiting time, and its averages."""

    def __init__(self) -> None:
        self.total_ns = 0
        self.averages = [0.0] * len(WINDOWS_SECONDS)
        self._seen_ns = 0

    def average(self, periods: int) -> None:
        """So many periods have passed; what was waited in them is spread evenly."""
        share = min(1.0, (self.total_ns - self._seen_ns) / (periods * PERIOD_NS))
        self._seen_ns = self.total_ns
        for place, seconds in enumerate(WINDOWS_SECONDS):
            fade = math.exp(-PERIOD_NS / 1e9 / seconds * periods)
            self.averages[place] = self.averages[place] * fade + share * (1 - fade)

    def line(self, name: str) -> str:
        """As Linux prints it; the total in microseconds."""
        values = " ".join(
            f"avg{seconds}={100 * average:.2f}"
            for seconds, average in zip(WINDOWS_SECONDS, self.averages, strict=True)
        )
        return f"{name} {values} total={self.total_ns // 1000}\n"


class Pressure:
    """`others_could_run` says whether a program waits alone; `now_ns` is a monotonic clock."""

    def __init__(self, now_ns: Callable[[], int], others_could_run: Callable[[], bool]) -> None:
        self.some = _Share()
        self.full = _Share()
        self._now_ns = now_ns
        self._others_could_run = others_could_run
        self._averaged_ns = now_ns()
        self._depth = 0

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """The running program waits for memory inside; may be nested, and counts once."""
        began_ns = self._now_ns()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                waited_ns = self._now_ns() - began_ns
                self.some.total_ns += waited_ns
                if not self._others_could_run():
                    self.full.total_ns += waited_ns

    def update(self) -> None:
        """Average what is due; to be called now and then."""
        periods = (self._now_ns() - self._averaged_ns) // PERIOD_NS
        if periods:
            self._averaged_ns += periods * PERIOD_NS
            for share in (self.some, self.full):
                share.average(min(periods, _PERIODS_MAX))

    def text(self) -> str:
        """/proc/pressure/memory."""
        self.update()
        return self.some.line("some") + self.full.line("full")

    def record(self) -> dict[str, dict[str, float]]:
        """The same for a report: shares of 1, and the totals in seconds."""
        self.update()
        return {
            name: {
                **{
                    f"avg{seconds}": average
                    for seconds, average in zip(WINDOWS_SECONDS, share.averages, strict=True)
                },
                "total_seconds": share.total_ns / 1e9,
            }
            for name, share in (("some", self.some), ("full", self.full))
        }
