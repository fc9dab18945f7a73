"""What was seen of a scenario, as one HTML page and as Markdown.

The page needs nothing else: the timelines are SVG in it, there is no script, nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from tools.experiment.svg import STYLE, Frame, legend, line_plot
from tools.scenario.model import Scene
from tools.scenario.scenario import Outcome

_LINES: Final = ("poisoned (pages put)", "served (files read wrong)", "caught (pages refused)")
_POINTS_MAX: Final = 24
_STYLE: Final = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1b1b; --rule: #d9d9d9; }
@media (prefers-color-scheme: dark) {
:root { --ground: #15171a; --ink: #e4e4e4; --rule: #3a3d42; }
}
body { font: 15px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--ground); color: var(--ink); }
.plots { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.plots svg { width: 100%; height: auto; }
.legend span { margin-right: 1.2rem; white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
"""


def acts(scenes: Sequence[Scene]) -> dict[str, list[Scene]]:
    """The scenes of each act, in their order."""
    found: dict[str, list[Scene]] = {}
    for scene in scenes:
        found.setdefault(scene.act, []).append(scene)
    return found


def timelines(all_scenes: Sequence[Scene]) -> list[str]:
    """An SVG for each act, on the same scales: what differs is what happened."""
    frame = Frame(
        max((scene.at_seconds for scene in all_scenes), default=1.0),
        max((max(_figures(scene)) for scene in all_scenes), default=1.0),
    )
    return [_timeline(act, scenes, frame) for act, scenes in acts(all_scenes).items()]


def _figures(scene: Scene) -> tuple[int, int, int]:
    return scene.poisoned, scene.served, scene.caught


def _timeline(act: str, scenes: Sequence[Scene], frame: Frame) -> str:
    step = -(-len(scenes) // _POINTS_MAX)
    chosen = [*scenes[:-1][::step], scenes[-1]]
    marks = [(scene.at_seconds, scene.mark) for scene in scenes if scene.mark]
    lines = {
        name: [(round(scene.at_seconds, 1), float(_figures(scene)[at])) for scene in chosen]
        for at, name in enumerate(_LINES)
    }
    return line_plot(act, "seconds", "pages, files", lines, frame._replace(marks=marks))


HEADER: Final = (
    "guest",
    "role",
    "wrong pages put",
    "files read",
    "files read wrong",
    "pages caught",
)


def rows(scene: Scene) -> list[tuple[str, ...]]:
    """A row of texts for each guest, as it was then."""
    return [
        (
            part.name,
            part.role,
            f"{part.poisoned_pages:,}" if part.role == "attacker" else "-",
            f"{part.read_files:,}" if part.role == "victim" else "-",
            f"{part.wrong_files:,}" if part.role == "victim" else "-",
            f"{part.caught_pages:,}" if part.role == "victim" else "-",
        )
        for part in scene.parts
    ]


def page(outcome: Outcome) -> str:
    """The HTML page."""
    scenario = outcome.scenario
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>tmem scenario {escape(scenario.name)}</title>",
        f"<style>{STYLE}{_STYLE}</style></head><body>",
        f"<h1>{escape(scenario.name)}: {escape(outcome.verdict)}</h1>",
        f"<p>{escape(scenario.explain)}</p>",
        f"<p>Attacker: {escape(scenario.tries)}.<br>Defence: {escape(_defence(outcome))}.</p>",
        f'<p class="legend">{legend(_LINES)}</p>',
        '<div class="plots">',
        *timelines(outcome.scenes),
        "</div>",
    ]
    for act, scenes in acts(outcome.scenes).items():
        parts += [f"<h2>{escape(act)}, at the end</h2>", _table(scenes[-1])]
    parts += ["<h2>What happened</h2><ol>"]
    parts += [f"<li>{escape(line)}</li>" for line in outcome.events]
    parts += ["</ol><h2>In sums</h2><ul>"]
    parts += [f"<li>{escape(f'{key}: {value}')}</li>" for key, value in _sums(outcome)]
    return "\n".join([*parts, "</ul>", f"<p>{escape(summary(outcome))}</p>", "</body></html>"])


def _sums(outcome: Outcome) -> list[tuple[str, str]]:
    problems = [("problem", line) for line in outcome.tally.problems]
    return [(key, str(value)) for key, value in outcome.tally.figures.items()] + problems


def markdown(outcome: Outcome) -> str:
    """The same as Markdown, but for the pictures, which are files beside it."""
    scenario = outcome.scenario
    lines = [
        f"# {scenario.name}: {outcome.verdict}",
        "",
        scenario.explain,
        "",
        f"Attacker: {scenario.tries}.  ",
        f"Defence: {_defence(outcome)}.",
    ]
    for number, (act, scenes) in enumerate(acts(outcome.scenes).items(), 1):
        lines += ["", f"## {act}", "", f"![timeline](timeline{number}.svg)", ""]
        lines += [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
        lines += [f"| {' | '.join(row)} |" for row in rows(scenes[-1])]
    lines += ["", "## What happened", "", *(f"1. {line}" for line in outcome.events)]
    lines += ["", "## In sums", "", *(f"* {key}: {value}" for key, value in _sums(outcome)), ""]
    return "\n".join([*lines, summary(outcome)])


def summary(outcome: Outcome) -> str:
    """The sums in one line."""
    tally = outcome.tally
    return (
        f"{tally.attempts:,} attempts, {tally.succeeded:,} succeeded, {tally.caught:,} caught; "
        f"victims checked {tally.victim_checks:,}, mismatches {tally.victim_mismatches:,}; "
        f"seed {outcome.seed}; verdict {outcome.verdict}"
    )


def write(outcome: Outcome, folder: Path) -> Path:
    """Write report.html, report.md, its pictures and results.json; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(outcome) + "\n")
    for number, picture in enumerate(timelines(outcome.scenes), 1):
        (folder / f"timeline{number}.svg").write_text(picture + "\n")
    (folder / "results.json").write_text(json.dumps(outcome.record(), indent=1) + "\n")
    path = folder / "report.html"
    path.write_text(page(outcome) + "\n")
    return path


def _defence(outcome: Outcome) -> str:
    scenario = outcome.scenario
    return scenario.stops if outcome.defence else f"off: {scenario.off}"


def _table(scene: Scene) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "\n".join(line("td", row) for row in rows(scene))
    return f'<div class="wide"><table>{line("th", HEADER)}\n{body}</table></div>'
