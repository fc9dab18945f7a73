"""What `tmem experiment classic` found: what is computed from its points, and tables in Markdown.

Each mode is compared with `static` of the same level.  Beside our figures stand those that were
published (`PUBLISHED`), in the same units:

    reads saved         1 - disk reads / disk reads of `static`, at the heaviest pressure
    reads saved a second    the difference over the mode's measured seconds
    swap I/O avoided    1 - pages to and from the swap disks / those of `static`
    hypervisor CPU      its CPU time over the measured seconds, as a share of one core
    CPU for an I/O saved    its CPU time over disk reads and swap pages that were not needed
    time lost           how much longer than `static` at the lowest pressure

Figures that a run was not asked for (`--direct`, `--ksm`) are not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tools.experiment.modes import KSM_MODE
from tools.units import PAGE_BYTES, format_size

READS_SAVED_LEAST: Final = 0.52
SWAP_SAVED_LEAST: Final = 0.76
SLOWER_MOST: Final = 0.02
"""By so much the CPU time of the same work differs from run to run: that is not slower."""
BASE: Final = "static"
GOAL_MODE: Final = "tmem"
CLOCKS: Final = {
    "seconds": "measured",
    "hdd_seconds": "HDD",
    "ssd_seconds": "SSD",
    "direct_seconds": "O_DIRECT",
}
"""All that there are; see `clocks`."""

Point = Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """A figure that somebody has published, and where."""

    key: str
    what: str
    figure: str


PUBLISHED: Final = (
    Published("reads_saved", "disk reads saved", "30 to 40 % (talk), up to 52 % (Xen Summit 2010)"),
    Published("reads_saved_per_second", "disk reads saved a second", "about 300 (OLS 2009)"),
    Published("swap_saved", "swap I/O avoided", "76 % at the heaviest (zswap 2013)"),
    Published("core_share", "hypervisor CPU, of a core", "0.08 to 0.15 % (talk)"),
    Published("us_per_io_saved", "hypervisor CPU for an I/O saved", "3.3 us (0.1 % for 300/s)"),
    Published("time_lost", "time lost at low pressure (HDD)", "none (zswap, N=8)"),
)


# --- figures


def pages_swapped(point: Point) -> int:
    """Pages to and from the swap disks."""
    return int(point["swap_in_pages"] + point["swap_out_pages"])


def compare(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """By mode: its figures beside those of `static`; empty without `static`."""
    base = {point["jobs"]: point for point in points if point["mode"] == BASE}
    if not base:
        return {}
    low, high = min(base), max(base)
    found = {}
    for mode in dict.fromkeys(point["mode"] for point in points):
        own = {point["jobs"]: point for point in points if point["mode"] == mode}
        saved = base[high]["disk_reads_pages"] - own[high]["disk_reads_pages"]
        swapped = pages_swapped(base[high]) - pages_swapped(own[high])
        cpu_seconds = own[high]["hypervisor_cpu_seconds"]
        found[mode] = {
            "pressure": base[high]["pressure"],
            "reads_saved": _share(saved, base[high]["disk_reads_pages"]),
            "reads_saved_per_second": _share(saved, own[high]["seconds"]),
            "swap_saved": _share(swapped, pages_swapped(base[high])),
            "core_share": _share(cpu_seconds, own[high]["seconds"]),
            "us_per_io_saved": _share(cpu_seconds * 1e6, saved + swapped)
            if saved + swapped > 0
            else None,
            "time_lost": _share(own[low]["hdd_seconds"], base[low]["hdd_seconds"], less=1.0)
            if low in own
            else None,
            "slowest": {
                clock: max(
                    (
                        _share(own[jobs][clock], base[jobs][clock], less=1.0) or 0.0,
                        base[jobs]["pressure"],
                    )
                    for jobs in own
                )
                for clock in clocks(points)
            },
        }
    return found


def clocks(points: Sequence[Point]) -> dict[str, str]:
    """Those that the points were timed by, and what they are called."""
    return {key: name for key, name in CLOCKS.items() if all(key in point for point in points)}


def _share(part: float, whole: float, *, less: float = 0.0) -> float | None:
    return part / whole - less if whole else None


def goals(compared: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is promised of mode `tmem`, what came of it; empty when it or `static` was not run."""
    own = compared.get(GOAL_MODE)
    if own is None:
        return {}
    reads, swap = own["reads_saved"], own["swap_saved"]
    return {
        "reads_saved": {
            "least": READS_SAVED_LEAST,
            "found": reads,
            "holds": reads is not None and reads >= READS_SAVED_LEAST,
        },
        "swap_saved": {
            "least": SWAP_SAVED_LEAST,
            "found": swap,
            "holds": swap is not None and swap >= SWAP_SAVED_LEAST,
        },
        **{
            f"never_slower_{clock}": {
                "most": SLOWER_MOST,
                "found": own["slowest"][clock][0],
                "pressure": own["slowest"][clock][1],
                "holds": own["slowest"][clock][0] <= SLOWER_MOST,
            }
            for clock in own["slowest"]
        },
    }


# --- texts

_HEADER: Final = (
    "pressure",
    "mode",
    "disk reads",
    "swap in",
    "swap out",
    "killed",
    "wrong",
    "hypervisor CPU s",
    "for a migration",
)


def header_row(points: Sequence[Point]) -> list[str]:
    """Of the table of all points."""
    named = [f"{name} s" for name in clocks(points).values()]
    return [*_HEADER[:2], *named, *_HEADER[2:]]


def rows_of(points: Sequence[Point]) -> Iterator[tuple[str, ...]]:
    """Of the same table."""
    for point in points:
        yield (
            f"{point['pressure']:g}",
            point["mode"],
            *(_spread(point, clock, 1 if point[clock] >= 10 else 2) for clock in clocks(points)),
            _spread(point, "disk_reads_pages", 0),
            f"{point['swap_in_pages']:,.0f}",
            f"{point['swap_out_pages']:,.0f}",
            f"{point['oom_kills']:,}",
            f"{point['mismatches']:,}",
            f"{point['hypervisor_cpu_seconds']:.2f}",
            format_size(int(point["migration_bytes"])),
        )


def _spread(point: Point, measure: str, digits: int) -> str:
    """The median, and half of the distance between the least and the most, if there is any."""
    least, most = point["spread"][measure]
    text = f"{point[measure]:,.{digits}f}"
    half = (most - least) / 2
    return text if half < 0.5 * 10**-digits else f"{text} ±{half:,.{digits}f}"


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "reads_saved_per_second":
        return f"{value:,.0f}"
    if key == "us_per_io_saved":
        return f"{value:,.0f} us"
    return f"{value:+.1%}" if key == "time_lost" else f"{value:.1%}"


def comparison(found: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows: what was published, and each mode beside `static`."""
    compared = found["compared"]
    modes = [mode for mode in compared if mode != BASE]
    rows = [
        (
            row.what,
            row.figure,
            *(_figure(row.key, compared[mode][row.key]) for mode in modes),
        )
        for row in PUBLISHED
    ]
    return ["", "published", *modes], rows


def goal_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What came of each goal."""
    texts = {
        "reads_saved": "disk reads saved at the heaviest pressure",
        "swap_saved": "swap I/O avoided at the heaviest pressure",
    }
    for key, goal in found["goals"].items():
        verdict = "holds" if goal["holds"] else "missed"
        value = "-" if goal["found"] is None else f"{goal['found']:.1%}"
        if key in texts:
            yield f"{texts[key]}: {value}, at least {goal['least']:.0%} wanted: {verdict}"
        else:
            clock = CLOCKS[key.removeprefix("never_slower_")]
            yield (
                f"never slower than {BASE} ({clock} time): at worst {goal['found']:+.1%}, at "
                f"pressure {goal['pressure']:g}: {verdict}"
            )


def setting(found: Mapping[str, Any]) -> str:
    """How large the experiment was."""
    plan = found["plan"]
    return (
        f"{plan['guests']} guests on {format_size(plan['total_bytes'])}, which is "
        f"{format_size(plan['share_bytes'])} each if it is divided evenly; the host keeps "
        f"{format_size(plan['host_reserve_bytes'])} beside that. Each guest builds "
        f"{format_size(plan['tree_bytes'])} of Python sources with "
        f"{', '.join(map(str, plan['jobs']))} compilers at a time, "
        f"{format_size(plan['memory_pages'] * PAGE_BYTES)} of memory each on average, "
        f"{_times(plan['passes'])}. Each point was run {_times(plan['repeat'])}, from seed "
        f"{plan['seed']}; figures are medians."
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def units(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the words mean."""
    disk = found.get("disk")
    named = [
        (
            "pressure",
            "what a guest needs over half of its share; 1 is none in any mode, 2 all there is",
        ),
        (
            "measured",
            "seconds of the slowest guest, with whatever else the machine did; disks are files "
            + ("in the host's page cache" if disk is None else "around the host's page cache"),
        ),
        (
            "HDD, SSD",
            "modelled: CPU time, also the hypervisor's, and 8 ms or 100 us for each disk access",
        ),
        ("disk reads, swap", "pages of 4 KiB, of all guests"),
        (
            "for a migration",
            "memory that is free or can be freed without writing to a disk, on average",
        ),
    ]
    if disk is not None:
        meaning = (
            "the same with the disk below, where half of a guest's accesses took no longer than "
            f"{disk['access_seconds'] * 1e6:,.0f} us (median of the runs). Images and swap are "
            f"files on {disk['file_system']} on {disk['device']}, and the host's page cache had "
            f"{_pages_or_unknown(disk['host_cached_pages'])} of them after the runs"
        )
        named.insert(3, ("O_DIRECT", meaning))
    return named


def _pages_or_unknown(pages: int | None) -> str:
    return "an unknown number of pages" if pages is None else f"{pages:,} pages"


def verified(found: Mapping[str, Any]) -> str:
    """That it was right, and what is not in it."""
    return (
        f"{found['verified_bytes']:,} bytes of files and all pages of programs were compared with "
        f"what they must be: {found['mismatches']} wrong."
    )


def ksm_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Merging by the host beside tmem, if it was asked for."""
    merged = found.get("ksm")
    if merged is None:
        return
    if merged["why_not"] is not None:
        yield f"not measured: {merged['why_not']}"
        return
    ram = merged["ram_pages"]
    yield (
        f"of {ram:,} pages of the guests' RAM {merged['merged_pages']:,} were merged on average "
        f"({merged['merged_pages'] / ram:.1%}), {merged['merged_pages_most']:,} at most; that is "
        f"{merged['profit_bytes'] / 1024:,.0f} KiB of profit on average (compilers stamp "
        "each page, and guests have different sources: little is equal in this load)"
    )
    cpu = merged["ksmd_cpu_seconds"]
    yield (
        "CPU time of ksmd is out of sight here"
        if cpu is None
        else f"ksmd took {cpu:.2f} s of CPU in {merged['seconds']:.1f} s, "
        f"{cpu / merged['seconds']:.0%} of a core; it looks at all of that RAM four times a second"
    )
    both = [found["compared"].get(mode) for mode in (KSM_MODE, GOAL_MODE)]
    if None not in both:
        figures = (
            f"{row.what} {_figure(row.key, both[0][row.key])} ({_figure(row.key, both[1][row.key])}"
            " without KSM)"
            for row in PUBLISHED
            if row.key in ("reads_saved", "swap_saved")
        )
        yield f"beside {BASE}, tmem with it: {', '.join(figures)}"


def complete(found: dict[str, Any]) -> dict[str, Any]:
    """The document with what is computed from the points."""
    compared = compare(found["points"])
    return {
        **found,
        "compared": compared,
        "goals": goals(compared),
        "verified_bytes": sum(run["verified_bytes"] for run in found["runs"]),
        "mismatches": sum(run["mismatches"] for run in found["runs"]),
    }


def markdown(found: Mapping[str, Any]) -> str:
    """Tables and what they say."""
    meanings = "; ".join(f"{word}: {meaning}" for word, meaning in units(found))
    lines = [
        setting(found),
        "",
        f"{meanings}.",
        "",
        verified(found),
        "",
        *_markdown_table(header_row(found["points"]), list(rows_of(found["points"]))),
    ]
    if found["compared"]:
        header, rows = comparison(found)
        lines += ["", f"Beside `{BASE}`, and what was published:", ""]
        lines += _markdown_table(header, rows)
    if found["goals"]:
        lines += ["", f"Goals of mode `{GOAL_MODE}`:", ""]
        lines += [f"* {line}" for line in goal_lines(found)]
    if "ksm" in found:
        lines += ["", "Same-page merging by the host's kernel (KSM):", ""]
        lines += [f"* {line}" for line in ksm_lines(found)]
    return "\n".join(lines)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    yield line(header)
    yield f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    for row in rows:
        yield line(row)
