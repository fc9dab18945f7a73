"""Ctrl-C, hang-up and termination, noticed at safe points.

An exception that a signal handler raises can strike between starting a process and writing it down.
So while a cluster lives the handler only remembers, and the supervisor's loops call `check`.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Final, Self

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NAP_SECONDS: Final = 0.05


class Interrupts:
    """A context in which signals wait for `check`."""

    def __init__(self) -> None:
        self._caught = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came since the context began."""
        if self._caught:
            raise KeyboardInterrupt

    def sleep(self, seconds: float) -> None:
        """Sleep, and wake up with KeyboardInterrupt soon after a signal."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, _NAP_SECONDS))
        self.check()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._caught = True
