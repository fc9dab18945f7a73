"""The experiments that made tmem known, measured again: `tmem experiment classic`.

N guests build a tree each with `make -jN` (`guests.workloads.make`), with more compilers at a time
from level to level: from no pressure to far beyond memory.  Each level is run in every mode
(`tools.experiment.modes`), on the same total memory, with the same trees and seeds, each time in a
cluster of its own.  Modes take turns within a level, so that what else the machine does spreads
over all of them.

    pressure    what a guest needs (sources, objects, the memory of all its compilers, the kernel's
                part) over half of its share M/N, which is the least RAM that it has in any mode.
                So 1 is none, whatever the mode, and at 2 the guests need all memory that there is
    seconds     of the slowest guest, measured.  That says little about disks, because the images
                are files in the host's page cache, and much about what else the machine does
    hdd, ssd    modelled, again of the slowest: the CPU time of its process and of the hypervisor
                for it, measured, and its accesses to both its disks, counted, times 8 ms and
                100 us.  So long it would take with a core and disks for itself
    direct      with `--direct`, when no disk is in the host's page cache: the same, times what the
                guest's median access took on the disk below

All figures are counted from when the work begins to when the last guest is done.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from fs.block.device import BLOCK_BYTES
from fs.block.direct import DirectFileDevice
from fs.block.hostcache import Backing, backing, cached_pages_of
from fs.errors import ImageError
from ipc.codec import Record
from ipc.errors import ExitCode, OperatorError
from tools.cluster import check_limits
from tools.experiment.merging import merging, together, why_not
from tools.experiment.modes import KSM_MODE, MODES, MODES_ON_DEMAND, Disks, Host
from tools.experiment.onerun import Work, run_once
from tools.experiment.sources import source_tree
from tools.image import Image, build_image, copy_image
from tools.interrupts import Interrupts
from tools.rundir import ClusterDirectory
from tools.swapfile import prepare_swap
from tools.units import PAGE_BYTES

ACCESS_SECONDS: Final = {"hdd": 0.008, "ssd": 0.0001}
"""What the model adds for each access to a disk."""
KERNEL_PAGES: Final = 80
"""About what a guest uses for neither files nor programs."""
HOST_RESERVE_SHARE: Final = 8
"""The host keeps one byte in so many of what it gives to guests and arena."""
MEASURES: Final = (
    "seconds",
    "disk_reads_pages",
    "swap_in_pages",
    "swap_out_pages",
    "oom_kills",
    "mismatches",
    "hypervisor_cpu_seconds",
    "guests_cpu_seconds",
    "hdd_seconds",
    "ssd_seconds",
    "accesses",
    "killed_programs",
    "migration_bytes",
    "sizes_most_bytes",
    "verified_bytes",
)
"""Figures of a run; a point has the median of each over its runs."""
DIRECT_MEASURES: Final = ("direct_seconds", "disk_access_seconds")


@dataclass(frozen=True)
class Plan:
    """How large and how long."""

    guests: int = 8
    share_bytes: int = 4 * 2**20
    """Memory of a guest when all is divided evenly."""
    tree_bytes: int = 448 * 2**10
    memory_pages: int = 72
    """Of an average compiler."""
    jobs: tuple[int, ...] = (1, 6, 10, 13, 16, 22, 28)
    """Compilers at a time, one level after the other."""
    swap_bytes: int = 32 * 2**20
    passes: int = 3
    """How often each guest builds its tree."""
    seed: int = 1
    repeat: int = 3
    modes: tuple[str, ...] = tuple(MODES)
    name: str = "classic"
    direct: bool = False
    """Disks of guests are used around the host's page cache."""
    ksm: bool = False
    """The heaviest level is run with merged RAM too, where the host's kernel can."""

    def pressure(self, jobs: int) -> float:
        """Of a level; at least 1."""
        # Objects are about as large as sources.
        pages = 2 * self.tree_bytes // PAGE_BYTES + jobs * self.memory_pages + KERNEL_PAGES
        return round(max(1.0, pages * PAGE_BYTES / (self.share_bytes / 2)), 2)

    @property
    def host(self) -> Host:
        """The guests and their memory."""
        names = tuple(f"guest{number}" for number in range(1, self.guests + 1))
        return Host(self.name, names, self.share_bytes, self.direct)

    def runs(self) -> Iterator[tuple[int, str, int]]:
        """Level (jobs), mode and seed of every run, in the order in which they are made."""
        for jobs in self.jobs:
            for number in range(self.repeat):
                for mode in self.modes_at(jobs):
                    yield jobs, mode, self.seed + number

    def modes_at(self, jobs: int) -> tuple[str, ...]:
        """The modes that a level is run in."""
        return (*self.modes, *([KSM_MODE] if self.ksm and jobs == self.jobs[-1] else []))


QUICK: Final = Plan(
    share_bytes=3584 * 2**10,
    tree_bytes=384 * 2**10,
    memory_pages=52,
    jobs=(1, 14, 38),
    passes=1,
    repeat=1,
    modes=tuple(mode for mode in MODES if mode != "tmem-plain"),
)


def chosen_modes(text: str, known: Collection[str] = MODES) -> tuple[str, ...]:
    """Modes from `a,b`; raises OperatorError for one that is none."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise OperatorError(
                f"there is no mode {name!r}; there are {', '.join(known)}", ExitCode.USAGE
            )
    return names


Progress = Callable[[int, int, str], None]
"""Told of runs done, runs in all, and what is done now."""


def prepare_images(host: Host, tree_bytes: int, cache: Path) -> dict[str, Image]:
    """Each guest's image with Python sources, once it is clear that the clusters can be started."""
    check_limits(len(host.guests), 2 * host.total_bytes, host.total_bytes)
    tree = str(source_tree(cache))
    return {name: build_image(tree, tree_bytes, name, cache) for name in host.guests}


def measure(
    plan: Plan,
    folder: Path,
    cache: Path,
    interrupts: Interrupts,
    progress: Progress,
    news: Callable[[str], None],
) -> Record:
    """All runs; the document of the experiment."""
    disk = direct_disk(folder) if plan.direct else None
    unmerged = why_not() if plan.ksm else None
    if unmerged is not None:
        news(f"KSM: {unmerged}; without it")
        plan = replace(plan, ksm=False)
    images = prepare_images(plan.host, plan.tree_bytes, cache.absolute())
    runs = list(plan.runs())
    found: list[Record] = []
    for number, (jobs, mode, seed) in enumerate(runs):
        progress(number, len(runs), f"{mode} at pressure {plan.pressure(jobs):g}")
        found.append(_run(plan, jobs, mode, seed, folder, images, interrupts, news))
    progress(len(runs), len(runs), "done")
    document: Record = {
        "points": [
            _point(plan, mode, jobs, found) for jobs in plan.jobs for mode in plan.modes_at(jobs)
        ],
        "runs": found,
        "plan": _plan_record(plan),
        "errors": [line for run in found for line in run["errors"]],
    }
    if disk is not None:
        counts = [run["host_cached_pages"] for run in found]
        cached = None if None in counts else max(counts)
        document["disk"] = disk._asdict() | {
            "host_cached_pages": cached,
            "access_seconds": median(run["disk_access_seconds"] for run in found),
        }
    if unmerged is not None:
        document["ksm"] = {"why_not": unmerged}
    elif plan.ksm:
        merged = [run for run in found if run["mode"] == KSM_MODE]
        document["ksm"] = together(merged, _ram_bytes(plan))
    return document


def _ram_bytes(plan: Plan) -> int:
    """Of all guests in mode `tmem+ksm`."""
    return int(MODES_ON_DEMAND[KSM_MODE].memory_shares * plan.host.total_bytes)


def direct_disk(folder: Path) -> Backing:
    """What files in a folder are on; raises OperatorError if O_DIRECT is not possible there."""
    where = Backing("unknown", "unknown")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(BLOCK_BYTES))
            file.flush()
            where = backing(file.fileno())
            DirectFileDevice(file.name).close()
    except OSError as reason:
        raise OperatorError(
            f"can't use the folder {folder}: {reason.strerror}", ExitCode.NO_INPUT
        ) from None
    except ImageError:
        raise OperatorError(
            f"{folder} is {where}, where O_DIRECT does not go around the host's page cache; choose"
            " a folder on a disk with --dir, or do without --direct",
            ExitCode.UNAVAILABLE,
        ) from None
    return where


def _plan_record(plan: Plan) -> Record:
    return {
        **vars(plan),
        "jobs": list(plan.jobs),
        "modes": list(plan.modes),
        "total_bytes": plan.host.total_bytes,
        "host_reserve_bytes": plan.host.total_bytes // HOST_RESERVE_SHARE,
        "access_seconds": ACCESS_SECONDS,
    }


def _run(
    plan: Plan,
    jobs: int,
    mode: str,
    seed: int,
    folder: Path,
    images: dict[str, Image],
    interrupts: Interrupts,
    news: Callable[[str], None],
) -> Record:
    """One run, in a cluster of its own."""
    directory = ClusterDirectory(folder / f"{mode}-{jobs}-{seed}")
    directory.check()
    work = {
        name: Work(
            seed * 1_000_003 + number,
            {
                "manifest": str(images[name].manifest),
                "jobs": jobs,
                "memory_pages": plan.memory_pages,
                "passes": plan.passes,
            },
        )
        for number, name in enumerate(plan.host.guests)
    }
    how = MODES.get(mode) or MODES_ON_DEMAND[mode]
    with (
        fresh_disks(plan.swap_bytes, directory, images) as disks,
        merging(_ram_bytes(plan) // PAGE_BYTES, interrupts.sleep) if how.ksm else nullcontext(),
    ):
        figures = run_once(how, plan.host, disks, work, directory, interrupts, ACCESS_SECONDS, news)
        if plan.direct:
            figures["host_cached_pages"] = _cached_pages(disks)
    shutil.rmtree(directory.path, ignore_errors=True)
    return {"mode": mode, "jobs": jobs, "seed": seed, **figures}


def _cached_pages(disks: dict[str, Disks]) -> int | None:
    """Pages of all images and swap files that the host's page cache has; None if it can't say."""
    counts = [cached_pages_of(path) for disk in disks.values() for path in (disk.image, disk.swap)]
    return sum(count for count in counts if count is not None) if None not in counts else None


@contextmanager
def fresh_disks(
    swap_bytes: int, directory: ClusterDirectory, images: dict[str, Image]
) -> Iterator[dict[str, Disks]]:
    """Fresh disks and swap files for all guests, gone afterwards."""
    directory.images.mkdir(mode=0o700, parents=True, exist_ok=True)
    disks = {}
    try:
        for name, image in images.items():
            path = directory.images / f"{name}.img"
            copy_image(image.path, path)
            swap = prepare_swap(name, swap_bytes, None)
            assert swap is not None
            swap.make(directory.images)
            disks[name] = Disks(path, swap.path(directory.images), swap.uuid)
        yield disks
    finally:
        shutil.rmtree(directory.images, ignore_errors=True)


def _point(plan: Plan, mode: str, jobs: int, found: list[Record]) -> Record:
    """What the runs of one mode and level say together."""
    runs = [run for run in found if (run["mode"], run["jobs"]) == (mode, jobs)]
    measures = (*MEASURES, *(DIRECT_MEASURES if plan.direct else []))
    spread = {
        measure: [min(run[measure] for run in runs), max(run[measure] for run in runs)]
        for measure in measures
    }
    point = {measure: median(run[measure] for run in runs) for measure in measures}
    # None of these may hide behind a median.
    point |= {name: max(run[name] for run in runs) for name in ("mismatches", "oom_kills")}
    return {
        "mode": mode,
        "pressure": plan.pressure(jobs),
        "jobs": jobs,
        **point,
        "tmem": runs[0]["tmem"],
        "spread": spread,
    }


def verdict(found: dict[str, Any]) -> tuple[ExitCode, list[str]]:
    """The exit code, and a line for each thing that went wrong."""
    lines = list(found["errors"])
    lines += [
        f"{run['mode']}, {run['jobs']} jobs: {run['mismatches']} wrong pages or files: "
        f"{', '.join(run['mismatch_paths'])}"
        for run in found["runs"]
        if run["mismatches"]
    ]
    return (ExitCode.VIOLATED if lines else ExitCode.OK), lines


def with_options(
    plan: Plan,
    *,
    guests: int | None,
    seed: int | None,
    repeat: int | None,
    modes: str | None,
    direct: bool = False,
    ksm: bool = False,
) -> Plan:
    """The plan as the command line changes it."""
    changes: dict[str, Any] = {"guests": guests, "seed": seed, "repeat": repeat}
    changes |= {"direct": direct, "ksm": ksm}
    if modes is not None:
        changes["modes"] = chosen_modes(modes)
    return replace(plan, **{key: value for key, value in changes.items() if value is not None})
