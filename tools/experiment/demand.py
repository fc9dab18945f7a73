"""Demand that moves, comes suddenly, or has no end: `tmem experiment moving`, `burst` and `oom`.

The guests have programs that need memory (`guests.workloads.programs`: every page that is read must
be what was written), one guest at a time, while the others have little to do.

    moving   each guest in turn needs twice its share; the sums are over all turns
    burst    one guest needs three times its share at once; `seconds` is how long its programs take
             to fill their memory, which is its reaction time to that demand, beside those of a
             guest that has all of it from the start (`enough`)
    oom      one guest's programs get larger from round to round until one is killed for lack of
             memory; `most_pages` is what they had in the last round before

Modes are those of `tools.experiment.modes`, on the same total memory; `tmem-borrow` lets a guest
use what the others' shares of tmem don't need at that time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ipc.codec import Record
from tools.experiment import classic
from tools.experiment.classic import ACCESS_SECONDS, KERNEL_PAGES, fresh_disks, prepare_images
from tools.experiment.modes import MODES, Host, Mode
from tools.experiment.onerun import Run, Work, running
from tools.image import Image
from tools.interrupts import Interrupts
from tools.rundir import ClusterDirectory
from tools.units import PAGE_BYTES

ENOUGH: Final = "enough"
"""Every guest has all the memory that its programs need, however much that is in all."""
DEMAND_MODES: Final[dict[str, Mode]] = {
    "static": MODES["static"],
    "balloon": MODES["balloon"],
    "cmm2": MODES["cmm2"],
    "tmem": MODES["tmem"],
    "tmem-borrow": replace(MODES["tmem"], borrow=True),
}
_PROGRAMS: Final = 2
_SUMS: Final = ("disk_reads_pages", "swap_in_pages", "swap_out_pages", "oom_kills", "mismatches")


@dataclass(frozen=True)
class Demand:
    """How large."""

    guests: int = 4
    share_bytes: int = 4 * 2**20
    swap_bytes: int = 24 * 2**20
    tree_bytes: int = 2**20
    seed: int = 1
    modes: tuple[str, ...] = tuple(DEMAND_MODES)
    name: str = "demand"

    @property
    def host(self) -> Host:
        """The guests and their memory."""
        names = tuple(f"guest{number}" for number in range(1, self.guests + 1))
        return Host(self.name, names, self.share_bytes)

    def pages(self, shares: float) -> int:
        """Of each program, if all of a guest need so many shares of the memory."""
        return int(shares * self.share_bytes / PAGE_BYTES) // _PROGRAMS


QUICK: Final = Demand(guests=3, share_bytes=3 * 2**20, tree_bytes=2**19)


def chosen_modes(text: str) -> tuple[str, ...]:
    """Modes from `a,b`; raises OperatorError for one that is none."""
    return classic.chosen_modes(text, DEMAND_MODES)


Steps = Callable[[Demand, Run], Record]
"""What is done in one cluster, and what came out."""
Progress = Callable[[int, int, str], None]


def moving(demand: Demand, run: Run) -> Record:
    """Each guest needs twice its share in turn."""
    turns = [_programs(demand, run, name, 2.0, passes=2) for name in demand.host.guests]
    return {
        "seconds": sum(turn["seconds"] for turn in turns),
        "ssd_seconds": sum(turn["ssd_seconds"] for turn in turns),
        "hdd_seconds": sum(turn["hdd_seconds"] for turn in turns),
        **{name: sum(turn[name] for turn in turns) for name in _SUMS},
    }


def burst(demand: Demand, run: Run) -> Record:
    """One guest needs three times its share."""
    found = _programs(demand, run, demand.host.guests[0], 3.0, passes=0)
    return {name: found[name] for name in ("seconds", "ssd_seconds", "hdd_seconds", *_SUMS)}


def oom(demand: Demand, run: Run) -> Record:
    """One guest needs more and more, half a share in each round."""
    most = 0
    shares = 1.0
    rounds: list[Record] = []
    while True:
        rounds.append(_programs(demand, run, demand.host.guests[0], shares, passes=0))
        if rounds[-1]["oom_kills"]:
            break
        most = _PROGRAMS * demand.pages(shares)
        shares += 0.5
    return {
        "most_pages": most,
        "most_shares": round(most * PAGE_BYTES / demand.share_bytes, 2),
        "seconds": sum(one["seconds"] for one in rounds),
        **{name: sum(one[name] for one in rounds) for name in _SUMS},
    }


EXPERIMENTS: Final[dict[str, Steps]] = {"moving": moving, "burst": burst, "oom": oom}


def _programs(demand: Demand, run: Run, name: str, shares: float, *, passes: int) -> Record:
    parameters = {"programs": _PROGRAMS, "pages": demand.pages(shares), "passes": passes}
    return run.result({name: Work(demand.seed, parameters, "programs")}, ACCESS_SECONDS)


def measure(
    name: str,
    demand: Demand,
    folder: Path,
    cache: Path,
    interrupts: Interrupts,
    progress: Progress,
    news: Callable[[str], None],
) -> Record:
    """One experiment in all its modes."""
    images = prepare_images(demand.host, demand.tree_bytes, cache.absolute())
    modes = [*demand.modes, *([ENOUGH] if name == "burst" else [])]
    points: list[Record] = []
    for number, mode in enumerate(modes):
        progress(number, len(modes), f"{name}: {mode}")
        points.append(_point(name, demand, mode, folder, images, interrupts, news))
    progress(len(modes), len(modes), "done")
    return {
        "experiment": name,
        "points": points,
        "plan": {**vars(demand), "modes": modes, "total_bytes": demand.host.total_bytes},
    }


def _point(
    name: str,
    demand: Demand,
    mode: str,
    folder: Path,
    images: dict[str, Image],
    interrupts: Interrupts,
    news: Callable[[str], None],
) -> Record:
    directory = ClusterDirectory(folder / f"{name}-{mode}")
    directory.check()
    errors: list[str] = []

    def complain(line: str) -> None:
        errors.append(line)
        news(line)

    enough_shares = 4.0 + KERNEL_PAGES * PAGE_BYTES / demand.share_bytes
    how = Mode(enough_shares) if mode == ENOUGH else DEMAND_MODES[mode]
    with (
        fresh_disks(demand.swap_bytes, directory, images) as disks,
        running(how, demand.host, disks, directory, interrupts, complain) as run,
    ):
        found = EXPERIMENTS[name](demand, run)
    shutil.rmtree(directory.path, ignore_errors=True)
    return {"mode": mode, **found, "errors": errors}


def table(found: Record) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A header, and a row a mode."""
    headers = {
        "most_shares": "most shares",
        "seconds": "seconds",
        "ssd_seconds": "SSD",
        "hdd_seconds": "HDD",
        "swap_in_pages": "swap in",
        "swap_out_pages": "swap out",
        "disk_reads_pages": "disk reads",
        "oom_kills": "killed",
    }
    shown = [key for key in headers if key in found["points"][0]]
    rows = [(point["mode"], *(_figure(point[key]) for key in shown)) for point in found["points"]]
    return ("mode", *(headers[key] for key in shown)), rows


def _figure(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"


def went_wrong(found: Record) -> list[str]:
    """A line for each thing that did."""
    lines = []
    for point in found["points"]:
        lines += [f"{point['mode']}: {line}" for line in point["errors"]]
        if point["mismatches"]:
            lines.append(f"{point['mode']}: {point['mismatches']} pages were not what was written")
    return lines
