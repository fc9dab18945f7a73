"""Line plots as SVG text, for reports that need nothing else to be looked at.

A line has its colour, dash and marker by its place, so that it can be told from one that lies on
it, in black and white, and by people with any colour vision.  Colours are CSS variables
(`STYLE`), which are others where the reader's screen is dark.

The y axis begins at zero.  It is logarithmic when the largest value is more than a hundred times
the smallest positive one, which would lie on the axis otherwise; zero is still at the bottom then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Final, NamedTuple

WIDTH: Final = 460
HEIGHT: Final = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 14, 34, 44
LOG_RATIO: Final = 100
_DECADES_MOST: Final = 6
_X_LABEL_WIDTH: Final = 30
# Okabe and Ito's colours, but for their yellow, and a grey.
COLOURS: Final = (
    "#000000",
    "#e69f00",
    "#56b4e9",
    "#cc79a7",
    "#0072b2",
    "#009e73",
    "#d55e00",
    "#808080",
)
_COLOURS_IN_THE_DARK: Final = {"#000000": "#f2f2f2", "#0072b2": "#3d9be0"}
_DASHES: Final = ("", "8 3", "3 3", "16 3", "9 3 3 3", "5 4", "7 2 2 2 2 2", "2 4")
_MARKERS: Final = (
    "M-4,0 a4,4 0 1,0 8,0 a4,4 0 1,0 -8,0 z",
    "M-3.5,-3.5 h7 v7 h-7 z",
    "M0,-4.5 L4.2,3 H-4.2 z",
    "M0,-4.8 L4.8,0 0,4.8 -4.8,0 z",
    "M0,4.5 L4.2,-3 H-4.2 z",
    "M-3,0 a3,3 0 1,0 6,0 a3,3 0 1,0 -6,0 z",
    "M-1.5,-4.5 h3 v3 h3 v3 h-3 v3 h-3 v-3 h-3 v-3 h3 z",
    "M-2.5,-2.5 h5 v5 h-5 z",
)


def _variables(colours: Sequence[str]) -> str:
    return "".join(f" --line-{number}: {colour};" for number, colour in enumerate(colours))


STYLE: Final = f"""
:root {{{_variables(COLOURS)} }}
@media (prefers-color-scheme: dark) {{
:root {{{_variables([_COLOURS_IN_THE_DARK.get(colour, colour) for colour in COLOURS])} }}
}}
"""

Line = Sequence[tuple[float, float]]


class _Axis(NamedTuple):
    """Ticks with their texts, and where a value is: 0 at the bottom, 1 at the top."""

    ticks: list[tuple[float, str]]
    place: Callable[[float], float]
    is_log: bool = False


class Frame(NamedTuple):
    """Axes of several plots that are to be compared: both from zero, and not logarithmic.  `marks`
    are places on the x axis with a text."""

    x_most: float
    y_most: float
    marks: Sequence[tuple[float, str]] = ()


def line_plot(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Line],
    frame: Frame | None = None,
) -> str:
    """One plot of lines with a point at each level."""
    points = [point for line in lines.values() for point in line]
    if frame is None:
        x_least = min((x for x, _ in points), default=0.0)
        x_most = max(max((x for x, _ in points), default=1.0), x_least + 1e-9)
        x_ticks = sorted({x for x, _ in points})
        axis = _axis([y for _, y in points])
    else:
        x_ticks = [tick for tick in ticks(frame.x_most) if tick <= frame.x_most]
        x_least, x_most = 0.0, max(frame.x_most, 1e-9)
        axis = _linear(frame.y_most)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_least) / (x_most - x_least) * (WIDTH - _LEFT - _RIGHT)
        return _LEFT + across, _height(axis.place(y))

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
            f' aria-label="{escape(title)}" font-family="sans-serif" font-size="11"'
            ' fill="currentColor">'
        ),
        _text(_LEFT, 18, title, weight="bold", size=13),
        _text((WIDTH + _LEFT) / 2, HEIGHT - 8, x_label, anchor="middle"),
        (
            f'<g transform="translate(12 {(HEIGHT + _TOP - _BOTTOM) / 2:.0f}) rotate(-90)">'
            f"{_text(0, 0, y_label + (', log scale' if axis.is_log else ''), anchor='middle')}</g>"
        ),
        *_grid(axis),
        *_x_ticks(x_ticks, lambda x: place(x, 0.0)[0]),
        *(_mark(place(x, 0.0)[0], text) for x, text in (frame.marks if frame else ())),
    ]
    for number, (name, line) in enumerate(lines.items()):
        parts += _drawn(number, name, line, [place(*point) for point in line])
    return "\n".join([*parts, "</svg>"])


def _axis(values: Sequence[float]) -> _Axis:
    most = max(values, default=1.0)
    least = min((value for value in values if value > 0), default=most)
    if least > 0 and most / least > LOG_RATIO:
        last = math.floor(math.log10(most) + 1e-9)
        first = max(math.floor(math.log10(least)), last - _DECADES_MOST)
        top = next(factor * 10.0**last for factor in (1, 2, 5, 10) if factor * 10.0**last >= most)
        # Zero has a place of its own, a decade below the first.
        steps = math.log10(top) - first + 1
        marks = [10.0**power for power in range(first, last + 1)]
        decades = [
            (mark, f"{mark:,.10g}") for mark in (*marks, *([top] if top > marks[-1] else []))
        ]

        def place_log(value: float) -> float:
            if value <= 0:
                return 0.0
            return max(0.0, (math.log10(value) - first + 1) / steps)

        return _Axis([(0.0, "0"), *decades], place_log, is_log=True)
    return _linear(most)


def _linear(most: float) -> _Axis:
    linear = ticks(most)
    return _Axis([(tick, f"{tick:,.10g}") for tick in linear], lambda value: value / linear[-1])


def _height(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _grid(axis: _Axis) -> list[str]:
    parts = []
    for tick, text in axis.ticks:
        y = _height(axis.place(tick))
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            f' stroke="currentColor" stroke-opacity="{0.15 if tick else 0.5}"/>'
        )
        parts.append(_text(_LEFT - 6, y + 4, text, anchor="end"))
    return parts


def _mark(x: float, text: str) -> str:
    """A line from top to bottom; its text is on the side where there is room."""
    right = x < (WIDTH + _LEFT) / 2
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 10}" y2="{HEIGHT - _BOTTOM}"'
        ' stroke="currentColor" stroke-opacity="0.5" stroke-dasharray="2 3"/>'
        + _text(x + (4 if right else -4), _TOP - 3, text, anchor="start" if right else "end")
    )


def _x_ticks(values: Sequence[float], place: Callable[[float], float]) -> list[str]:
    """A text for each level, but for those whose texts would lie on the one before."""
    parts = []
    free_from = -math.inf
    for value in values:
        x = place(value)
        if x >= free_from:
            parts.append(_text(x, HEIGHT - _BOTTOM + 16, f"{value:g}", anchor="middle"))
            free_from = x + _X_LABEL_WIDTH
    return parts


def _drawn(number: int, name: str, line: Line, places: Sequence[tuple[float, float]]) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" {_stroke(number)}/>']
    parts += [
        f'<path d="{_pick(_MARKERS, number)}" transform="translate({x:.1f} {y:.1f})"'
        f' style="fill:{_colour(number)}"><title>{escape(name)}: {value:,.6g}</title></path>'
        for (x, y), (_, value) in zip(places, line, strict=True)
    ]
    return parts


def legend(names: Sequence[str]) -> str:
    """Whose line looks how, as HTML."""
    return " ".join(
        '<span><svg width="34" height="12" viewBox="-17 -6 34 12" aria-hidden="true">'
        f'<line x1="-17" x2="17" y1="0" y2="0" {_stroke(number)}/>'
        f'<path d="{_pick(_MARKERS, number)}" style="fill:{_colour(number)}"/></svg>'
        f" {escape(name)}</span>"
        for number, name in enumerate(names)
    )


def ticks(most: float) -> list[float]:
    """Round numbers from zero to the first one that is not below `most`; four to six of them."""
    if most <= 0:
        return [0.0, 1.0]
    rough = most / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(most / step - 1e-9) + 1)]


def _pick(choices: Sequence[str], number: int) -> str:
    return choices[number % len(choices)]


def _colour(number: int) -> str:
    """With what it is where nobody has defined the variables."""
    return f"var(--line-{number % len(COLOURS)}, {_pick(COLOURS, number)})"


def _stroke(number: int) -> str:
    dash = _pick(_DASHES, number)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke-width="2"{dashed} style="stroke:{_colour(number)}"'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "", size: int = 0
) -> str:
    extra = (f' font-weight="{weight}"' if weight else "") + (
        f' font-size="{size}"' if size else ""
    )
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'
