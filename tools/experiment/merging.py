"""KSM beside tmem: the host's kernel merges equal pages of guests' RAM while an experiment runs.

    KSM      finds what is equal in RAM, by reading all of it again and again (the thread ksmd)
    tmem     keeps what did not stay in RAM

So what the one saves should hardly change what the other does; mode `tmem+ksm` says how much it is.
Pages and profit are those of the guests' own processes (/proc/PID/ksm_stat): the profit is the
merged pages less the kernel's tables for them, and has each content's one page in it too.  The
host's own `pages_sharing` is no measure: pages of processes that are gone stay in it for a while.

KSM is the administrator's: it is switched on for the run only, at a speed at which ksmd comes
round in a quarter of a second, since builds take seconds here and not hours, and is left as it was.
Who does that holds a lock (`flock` of /sys/kernel/mm/ksm/run), so that no other run takes what is
set for this one for what was there before.  A run that is killed with SIGKILL leaves KSM on.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, Final, TextIO

from guests.ksm import figures
from ipc.codec import Record
from ipc.errors import ExitCode, OperatorError
from tools.units import PAGE_BYTES

SYSTEM: Final = Path("/sys/kernel/mm/ksm")
ROUND_SECONDS: Final = 0.25
_SLEEP_MILLISECONDS: Final = 20
_LOCK_SECONDS: Final = 0.1
_FIGURES: Final = ("merged_pages", "profit_bytes")
_PROCESSES: Final = Path("/proc")


def why_not(system: Path = SYSTEM) -> str | None:
    """Why guests' RAM can't be merged on this machine, None if it can."""
    if not (system / "run").exists():
        return "not on this kernel"
    try:
        (system / "run").write_text((system / "run").read_text())
    except OSError as reason:
        return f"{system / 'run'} can't be written to ({reason.strerror}); run it as root"
    return None


@contextmanager
def merging(
    pages: int, wait: Callable[[float], object] = time.sleep, system: Path = SYSTEM
) -> Iterator[None]:
    """KSM looks for equal ones among so many pages; afterwards it does what it did before.

    `wait` lets seconds pass while another run has KSM.
    """
    with (system / "run").open() as lock:
        while not _locked(lock):
            wait(_LOCK_SECONDS)
        yield from _set(pages, system)


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _set(pages: int, system: Path) -> Iterator[None]:
    wanted = {
        "sleep_millisecs": _SLEEP_MILLISECONDS,
        "pages_to_scan": max(100, round(pages * _SLEEP_MILLISECONDS / 1000 / ROUND_SECONDS)),
        "run": 1,
    }
    before = {name: (system / name).read_text() for name in wanted}
    try:
        for name, value in wanted.items():
            try:
                (system / name).write_text(str(value))
            except OSError as reason:
                raise OperatorError(
                    f"KSM: {system / name} can't be set to {value} ({reason.strerror}); set it"
                    " yourself or do without --ksm",
                    ExitCode.UNAVAILABLE,
                ) from None
        yield
    finally:
        for name, text in before.items():
            (system / name).write_text(text)


class Merged:
    """What is merged in the course of a run, seen now and then."""

    def __init__(self) -> None:
        self._cpu_before = _ksmd_cpu_seconds()
        self._looks: list[dict[str, int]] = []

    def look(self, processes: Mapping[str, int | None]) -> None:
        """Count now; guests by name."""
        guests = [figures(pid) for pid in processes.values() if pid is not None]
        self._looks.append({key: sum(guest[key] for guest in guests) for key in _FIGURES})

    def record(self) -> Record:
        """Means over the looks, and the most; CPU time of ksmd, None where it is not seen."""
        found: dict[str, Any] = {"looks": len(self._looks)}
        for key in _FIGURES:
            values = [look[key] for look in self._looks] or [0]
            found[key] = round(fmean(values))
            found[f"{key}_most"] = max(values)
        before, now = self._cpu_before, _ksmd_cpu_seconds()
        found["ksmd_cpu_seconds"] = None if before is None or now is None else now - before
        return found


def _ksmd_cpu_seconds() -> float | None:
    """Of the host's thread that merges; None where its process is out of sight."""
    for comm in _PROCESSES.glob("[0-9]*/comm"):
        try:
            if comm.read_text() == "ksmd\n":
                return int((comm.parent / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            continue
    return None


def together(runs: list[Record], ram_bytes: int) -> Record:
    """What the runs of the mode say: means of means, and the most of all."""
    merged = [run["ksm"] for run in runs]
    cpu = [one["ksmd_cpu_seconds"] for one in merged]
    seconds = fmean(run["seconds"] for run in runs)
    found: Record = {"why_not": None, "ram_pages": ram_bytes // PAGE_BYTES, "seconds": seconds}
    for key in _FIGURES:
        found[key] = round(fmean(one[key] for one in merged))
        found[f"{key}_most"] = max(one[f"{key}_most"] for one in merged)
    found["ksmd_cpu_seconds"] = None if None in cpu else fmean(cpu)
    return found
