"""What `tmem experiment classic` found: results.json, a table in Markdown, a page with plots.

Each mode is compared with `static` of the same level.  Beside our figures stand those that were
published (`PUBLISHED`), in the same units:

    reads saved         1 - disk reads / disk reads of `static`, at the heaviest pressure
    reads saved a second    the difference over the mode's measured seconds
    swap I/O avoided    1 - pages to and from the swap disks / those of `static`
    hypervisor CPU      its CPU time over the measured seconds, as a share of one core
    CPU for an I/O saved    its CPU time over disk reads and swap pages that were not needed
    time lost           how much longer than `static` at the lowest pressure
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

from tools.experiment.svg import legend, line_plot
from tools.units import PAGE_BYTES, format_size

READS_SAVED_LEAST: Final = 0.52
SWAP_SAVED_LEAST: Final = 0.76
SLOWER_MOST: Final = 0.02
"""By so much the CPU time of the same work differs from run to run: that is not slower."""
BASE: Final = "static"
GOAL_MODE: Final = "tmem"
CLOCKS: Final = {"seconds": "measured", "hdd_seconds": "HDD", "ssd_seconds": "SSD"}

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
            "time_lost": _share(own[low]["hdd_seconds"], base[low]["hdd_seconds"], less=1.0),
            "slowest": {
                clock: max(
                    (
                        _share(own[jobs][clock], base[jobs][clock], less=1.0) or 0.0,
                        base[jobs]["pressure"],
                    )
                    for jobs in base
                )
                for clock in CLOCKS
            },
        }
    return found


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
            for clock in CLOCKS
        },
    }


# --- texts

_HEADER: Final = (
    "pressure",
    "mode",
    "seconds",
    "HDD s",
    "SSD s",
    "disk reads",
    "swap in",
    "swap out",
    "killed",
    "wrong",
    "hypervisor CPU s",
    "for a migration",
)


def _rows(points: Sequence[Point]) -> Iterator[tuple[str, ...]]:
    for point in points:
        yield (
            f"{point['pressure']:g}",
            point["mode"],
            _spread(point, "seconds", 1),
            f"{point['hdd_seconds']:.1f}",
            f"{point['ssd_seconds']:.1f}",
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


def _comparison(found: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
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


def _goal_lines(found: Mapping[str, Any]) -> Iterator[str]:
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


def _setting(found: Mapping[str, Any]) -> list[str]:
    plan = found["plan"]
    memory = (
        f"{plan['guests']} guests on {format_size(plan['total_bytes'])}, which is "
        f"{format_size(plan['share_bytes'])} each if it is divided evenly; the host keeps "
        f"{format_size(plan['host_reserve_bytes'])} beside that. Each guest builds "
        f"{format_size(plan['tree_bytes'])} of Python sources with "
        f"{', '.join(map(str, plan['jobs']))} compilers at a time, "
        f"{format_size(plan['memory_pages'] * PAGE_BYTES)} of memory each on average, "
        f"{plan['passes']} time(s). Runs of each point: {plan['repeat']}, from seed "
        f"{plan['seed']}; figures are medians."
    )
    units = (
        "pressure: what a guest needs over half of its share; 1 is none in any mode, at 2 guests "
        "need all memory there is. seconds: measured, of the slowest guest, with whatever else the "
        "machine did. HDD, SSD: modelled, its CPU time and the hypervisor's for it, and 8 ms or "
        "100 us for each counted access to a disk. Disk reads and swap: pages of 4 KiB, of all "
        "guests. For a migration: memory that is free or can be freed without writing to a disk, "
        "on average."
    )
    verified = (
        f"{found['verified_bytes']:,} bytes of files and all pages of programs were compared with "
        f"what they must be: {found['mismatches']} wrong. Mode cmm2 (page states) is left out: no "
        "guest here has it."
    )
    return [memory, units, verified]


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
    lines = [*_setting(found), "", *_markdown_table(_HEADER, list(_rows(found["points"])))]
    if found["compared"]:
        header, rows = _comparison(found)
        lines += ["", f"Beside `{BASE}`, and what was published:", ""]
        lines += _markdown_table(header, rows)
    if found["goals"]:
        lines += ["", f"Goals of mode `{GOAL_MODE}`:", ""]
        lines += [f"* {line}" for line in _goal_lines(found)]
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


_PLOTS: Final = (
    ("Disk reads", "pages", lambda point: point["disk_reads_pages"]),
    ("Swap I/O", "pages in and out", pages_swapped),
    ("Time with a hard disk (modelled)", "seconds", lambda point: point["hdd_seconds"]),
    ("Time with an SSD (modelled)", "seconds", lambda point: point["ssd_seconds"]),
    ("Time (measured)", "seconds", lambda point: point["seconds"]),
    ("Hypervisor CPU", "seconds", lambda point: point["hypervisor_cpu_seconds"]),
    ("For a migration", "MiB", lambda point: point["migration_bytes"] / 2**20),
    ("Killed for memory", "programs", lambda point: point["oom_kills"]),
)

_STYLE: Final = """
body { font: 15px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
.legend span { margin-right: 1.2rem; white-space: nowrap; }
"""


def page(found: Mapping[str, Any]) -> str:
    """The same as one HTML page that needs nothing else."""
    points = found["points"]
    modes = list(dict.fromkeys(point["mode"] for point in points))
    plots = [
        line_plot(
            title,
            "pressure",
            unit,
            {
                mode: [
                    (point["pressure"], float(value(point)))
                    for point in points
                    if point["mode"] == mode
                ]
                for mode in modes
            },
        )
        for title, unit, value in _PLOTS
    ]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><title>tmem experiment classic</title>',
        f"<style>{_STYLE}</style></head><body>",
        "<h1>Transcendent memory: the classic experiment</h1>",
        *(f"<p>{escape(line)}</p>" for line in _setting(found)),
        f'<p class="legend">{legend(modes)}</p>',
        '<div class="plots">',
        *plots,
        "</div>",
    ]
    if found["compared"]:
        header, rows = _comparison(found)
        parts += [f"<h2>Beside {BASE}, and what was published</h2>", _html_table(header, rows)]
    if found["goals"]:
        parts.append(f"<h2>Goals of mode {GOAL_MODE}</h2><ul>")
        parts += [f"<li>{escape(line)}</li>" for line in _goal_lines(found)]
        parts.append("</ul>")
    parts += ["<h2>All points</h2>", _html_table(_HEADER, list(_rows(points))), "</body></html>"]
    return "\n".join(parts)


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return "\n".join(
        ["<table>", line("th", header), *(line("td", row) for row in rows), "</table>"]
    )


def write(found: Mapping[str, Any], folder: Path) -> None:
    """Write results.json, report.md and report.html into a folder."""
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(found) + "\n")
    (folder / "report.html").write_text(page(found))
