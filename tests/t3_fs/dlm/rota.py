"""Programs that wait, run one at a time: each in a thread, but only one ever runs.

A program calls `turn.wait()` where it would wait for the world; the driver lets it go on with
`Program.run`. So code that blocks runs in an order that a seed decides.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Stopped(BaseException):
    """The program has to end now."""


class Program:
    """One program and its thread."""

    def __init__(self, body: Callable[[Program], None]) -> None:
        self._body = body
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._stop = False
        self.ended = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Let it go on until it waits again; what it raised is raised here."""
        if self.ended:
            return
        self._go.release()
        self._back.acquire()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def wait(self) -> None:
        """Called by the program."""
        if self._stop:
            raise Stopped
        self._back.release()
        self._go.acquire()
        if self._stop:
            raise Stopped

    def stop(self) -> None:
        """End it where it waits."""
        self._stop = True
        self.run()
        self._thread.join()

    def _main(self) -> None:
        self._go.acquire()
        try:
            if not self._stop:
                self._body(self)
        except Stopped:
            pass
        except BaseException as problem:  # noqa: BLE001 - the driver raises it
            self.failure = problem
        self.ended = True
        self._back.release()
