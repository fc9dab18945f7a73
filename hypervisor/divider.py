"""The memory scheduler beside the server: targets are computed by a thread of their own.

To divide memory takes 10 to 100 ms, and nobody may wait so long for a call.  The thread shares the
interpreter with the server: whenever the server wants it back, the thread gives it up after
`SHARE_SECONDS` (Python's own switch interval of 5 ms would delay each call by that).  It touches no
state of the machine: what it works on is a snapshot, and who begins a division fetches the answer.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Final

from hypervisor.balance import Answers
from hypervisor.scheduler import Snapshot, targets

SHARE_SECONDS: Final = 0.0002
"""About what a slice of reaping takes."""


class Divider:
    """`compute` for a `Balance`."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        sys.setswitchinterval(SHARE_SECONDS)

    def compute(self, snapshot: Snapshot) -> Callable[[], Answers | None]:
        """Begin; what is returned tells the answer once it is there."""
        answers: list[Answers] = []

        def work() -> None:
            # Signals are the main thread's: they must interrupt its wait, not this one.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            answers.append(targets(snapshot))

        def ask() -> Answers | None:
            # A thread that ended without an answer has met a bug, which is our end, too.
            return None if thread.is_alive() else answers[0]

        thread = threading.Thread(target=work, name="divider", daemon=True)
        self._threads = [one for one in self._threads if one.is_alive()]
        self._threads.append(thread)
        thread.start()
        return ask

    def close(self) -> None:
        """Wait for what nobody wants any more."""
        for thread in self._threads:
            thread.join()
