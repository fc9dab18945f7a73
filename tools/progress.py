"""How measured runs show their progress: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from ipc.codec import Record
from tools.demo import Reporter
from tools.units import PAGE_BYTES, format_size


def make_reporter(stream: TextIO, *, quiet: bool) -> Reporter:
    """The reporter that fits a stream."""
    if quiet:
        return QuietReporter()
    return BarReporter(stream) if stream.isatty() else LineReporter(stream)


class QuietReporter:
    """Tells only what a person should know."""

    def mode(self, mode: str, phases: int) -> None:
        """Nothing."""

    def phase(self, number: int, title: str, work: dict[str, str]) -> None:
        """Nothing."""

    def status(self, statuses: dict[str, Record]) -> None:
        """Nothing."""

    def news(self, line: str) -> None:
        """A line on standard error."""
        print(f"tmem: {line}", file=sys.stderr)

    def close(self) -> None:
        """Nothing is held."""


class LineReporter:
    """A line when a phase begins and when it has ended."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._mode = ""
        self._phases = 0
        self._open: tuple[str, float] | None = None
        self._reads = 0

    def mode(self, mode: str, phases: int) -> None:
        """Remember the mode; it stands before each line."""
        self._end_phase()
        self._mode, self._phases, self._reads = mode, phases, 0

    def phase(self, number: int, title: str, work: dict[str, str]) -> None:
        """One line."""
        self._end_phase()
        self._open = (f"{self._mode} {number + 1}/{self._phases} {title}", time.monotonic())
        doing = ", ".join(f"{name} {workload}" for name, workload in work.items())
        self._print(f"{self._open[0]}: {doing}")

    def status(self, statuses: dict[str, Record]) -> None:
        """Keep the disk reads for the end of the phase."""
        self._reads = sum(status["counters"]["disk_reads_pages"] for status in statuses.values())

    def news(self, line: str) -> None:
        """One line."""
        self._print(line)

    def close(self) -> None:
        """End the last phase."""
        self._end_phase()

    def _end_phase(self) -> None:
        if self._open is not None:
            title, start = self._open
            size = format_size(self._reads * PAGE_BYTES)
            self._print(f"{title}: {time.monotonic() - start:.1f} s, disk reads so far {size}")
        self._open = None

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class BarReporter:
    """A bar a guest, with the pages it has read from its disk and from tmem."""

    def __init__(self, stream: TextIO) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=Console(file=stream),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._mode = ""
        self._phases = 0
        self._progress.start()

    def mode(self, mode: str, phases: int) -> None:
        """Remember the mode."""
        self._mode, self._phases = mode, phases

    def phase(self, number: int, title: str, work: dict[str, str]) -> None:
        """A headline, and fresh bars."""
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self._progress.console.print(f"{self._mode} {number + 1}/{self._phases} {title}")
        self._tasks = {
            name: self._progress.add_task(f"{name} {workload}", total=None, detail="")
            for name, workload in work.items()
        }

    def status(self, statuses: dict[str, Record]) -> None:
        """Move the bars."""
        for name, status in statuses.items():
            if name not in self._tasks:
                continue
            counters = status["counters"]
            detail = f"disk {counters['disk_reads_pages']:,} pages"
            hits = counters.get("cleancache", {}).get("succ_gets", 0)
            if hits:
                detail += f", tmem {hits:,}"
            total = max(1, status["total"])
            done = total if status["state"] == "idle" else status["done"]
            self._progress.update(self._tasks[name], completed=done, total=total, detail=detail)

    def news(self, line: str) -> None:
        """A line above the bars."""
        self._progress.console.print(line, markup=False)

    def close(self) -> None:
        """Take the bars away."""
        self._progress.stop()


class SweepReporter:
    """Many runs one after the other: which is on, how many are done, and how long the rest takes.

    The time left is that of an average run so far for each that is left.
    """

    def __init__(
        self, stream: TextIO, *, quiet: bool, now_seconds: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._quiet = quiet
        self._now_seconds = now_seconds
        self._began_at = now_seconds()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if stream.isatty() and not quiet:
            self._bar = Progress(
                TextColumn("{task.description:<32}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                TimeElapsedColumn(),
                console=Console(file=stream),
                transient=True,
            )
            self._task = self._bar.add_task("", total=None, left="")
            self._bar.start()

    def step(self, done: int, total: int, what: str) -> None:
        """So many runs are done, and `what` is next."""
        left = self.left(done, total)
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=done, total=total, left=left)
        elif not self._quiet and done < total:
            line = f"{done + 1}/{total} {what}" + (f", {left}" if left else "")
            print(line, file=self._stream, flush=True)

    def left(self, done: int, total: int) -> str:
        """The time left, once there is something to judge by."""
        if not done or done >= total:
            return ""
        seconds = (self._now_seconds() - self._began_at) / done * (total - done)
        return f"{seconds / 60:.0f} min left" if seconds >= 120 else f"{seconds:.0f} s left"

    def news(self, line: str) -> None:
        """A line that a person should see."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False)
        else:
            print(f"tmem: {line}", file=sys.stderr)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
