"""The report of `tmem experiment classic` as one HTML page, and all its files.

The page needs nothing else: plots are SVG in it, there is no script, nothing is fetched.  It
follows the reader's choice of light or dark, and tables too wide for a screen scroll by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from tools.experiment.classic_report import (
    BASE,
    GOAL_MODE,
    comparison,
    goal_lines,
    header_row,
    ksm_lines,
    markdown,
    pages_swapped,
    rows_of,
    setting,
    units,
    verified,
)
from tools.experiment.svg import STYLE, legend, line_plot

_PLOTS: Final = (
    ("Disk reads", "pages", lambda point: point["disk_reads_pages"]),
    ("Swap I/O", "pages in and out", pages_swapped),
    ("Time with a hard disk (modelled)", "seconds", lambda point: point["hdd_seconds"]),
    ("Time with an SSD (modelled)", "seconds", lambda point: point["ssd_seconds"]),
    ("Time with this disk (O_DIRECT)", "seconds", lambda point: point.get("direct_seconds")),
    ("Time (measured)", "seconds", lambda point: point["seconds"]),
    ("Hypervisor CPU", "seconds", lambda point: point["hypervisor_cpu_seconds"]),
    ("For a migration", "MiB", lambda point: point["migration_bytes"] / 2**20),
    ("Killed for memory", "programs", lambda point: point["oom_kills"]),
)

_STYLE: Final = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1b1b; --rule: #d9d9d9; }
@media (prefers-color-scheme: dark) {
:root { --ground: #15171a; --ink: #e4e4e4; --rule: #3a3d42; }
}
body { font: 15px/1.5 sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--ground); color: var(--ink); }
h1 { line-height: 1.2; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { font-weight: bold; }
dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; }
th { vertical-align: bottom; }
td, .mode { white-space: nowrap; }
td.words { white-space: normal; min-width: 8rem; }
.figure { text-align: right; }
tr.begins td { border-top: 2px solid var(--rule); }
.plots { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.plots svg { width: 100%; height: auto; }
.legend { position: sticky; top: 0; background: var(--ground); padding: .4rem 0; }
.legend span { margin-right: 1.2rem; white-space: nowrap; }
@media (max-width: 30rem) {
dl { display: block; }
dd { margin: 0 0 .5rem; }
}
"""


def page(found: Mapping[str, Any]) -> str:
    """The same as one HTML page that needs nothing else."""
    modes = list(dict.fromkeys(point["mode"] for point in found["points"]))
    plots, nothing = _plots(found, modes)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>tmem experiment classic</title>",
        f"<style>{STYLE}{_STYLE}</style></head><body>",
        "<h1>Transcendent memory: the classic experiment</h1>",
        f"<p>{escape(setting(found))}</p>",
        "<dl>",
        *(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in units(found)),
        "</dl>",
        f"<p>{escape(verified(found))}</p>",
        f'<p class="legend">{legend(modes)}</p>',
        '<div class="plots">',
        *plots,
        "</div>",
        *(f"<p>{escape(title)}: none in any mode.</p>" for title in nothing),
    ]
    if found["compared"]:
        header, rows = comparison(found)
        parts += [f"<h2>Beside {BASE}, and what was published</h2>", _html_table(header, rows)]
    if found["goals"]:
        parts += [f"<h2>Goals of mode {GOAL_MODE}</h2>", _html_list(goal_lines(found))]
    if "ksm" in found:
        parts += [
            "<h2>Same-page merging by the host's kernel (KSM)</h2>",
            _html_list(ksm_lines(found)),
        ]
    rows = list(rows_of(found["points"]))
    parts += ["<h2>All points</h2>", _html_table(header_row(found["points"]), rows, grouped=True)]
    return "\n".join([*parts, "</body></html>"])


def _plots(found: Mapping[str, Any], modes: Sequence[str]) -> tuple[list[str], list[str]]:
    """The plots of what was measured, and titles of those that would be nothing but zeros."""
    plots, nothing = [], []
    for title, unit, value in _PLOTS:
        if any(value(point) is None for point in found["points"]):
            continue
        lines = {
            mode: [
                (point["pressure"], float(value(point)))
                for point in found["points"]
                if point["mode"] == mode
            ]
            for mode in modes
        }
        if any(y for line in lines.values() for _, y in line):
            plots.append(line_plot(title, "pressure", unit, lines))
        else:
            nothing.append(title)
    return plots, nothing


def _html_list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, grouped: bool = False
) -> str:
    """Figures stand to the right; `grouped`: rows with another first cell than the one before are
    set apart."""
    kinds = [_kind([row[column] for row in rows]) for column in range(len(header))]

    def line(tag: str, cells: Sequence[str], kind: str = "") -> str:
        texts = zip(cells, kinds, strict=True)
        row = "".join(f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for cell, kind in texts)
        return f'<tr class="{kind}">{row}</tr>' if kind else f"<tr>{row}</tr>"

    lines = [line("th", header)]
    for number, row in enumerate(rows):
        begins = grouped and number > 0 and row[0] != rows[number - 1][0]
        lines.append(line("td", row, "begins" if begins else ""))
    return "\n".join(['<div class="wide"><table>', *lines, "</table></div>"])


def _kind(cells: Sequence[str]) -> str:
    """Of a column: `figure`, `words` where there is room to wrap, else `mode`."""
    if all(cell[:1] in "+-" or cell[:1].isdigit() for cell in cells):
        return "figure"
    return "words" if any(" " in cell for cell in cells) else "mode"


def write(found: Mapping[str, Any], folder: Path) -> None:
    """Write results.json, report.md and report.html into a folder."""
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(found) + "\n")
    (folder / "report.html").write_text(page(found))
