"""Line plots as SVG text, for reports that need nothing else to be looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

WIDTH: Final = 460
HEIGHT: Final = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 34, 44
# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS: Final = (
    "#000000",
    "#e69f00",
    "#56b4e9",
    "#cc79a7",
    "#0072b2",
    "#009e73",
    "#d55e00",
)

Line = Sequence[tuple[float, float]]


def line_plot(title: str, x_label: str, y_label: str, lines: Mapping[str, Line]) -> str:
    """One plot; both axes begin at the least and at zero, lines have their colours by place."""
    points = [point for line in lines.values() for point in line]
    x_least = min((x for x, _ in points), default=0.0)
    x_most = max(max((x for x, _ in points), default=1.0), x_least + 1e-9)
    y_ticks = ticks(max((y for _, y in points), default=1.0))
    y_most = y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_least) / (x_most - x_least) * (WIDTH - _LEFT - _RIGHT)
        up = y / y_most * (HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, HEIGHT - _BOTTOM - up

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
            f' aria-label="{escape(title)}" font-family="sans-serif" font-size="11">'
        ),
        _text(_LEFT, 18, title, weight="bold", size=13),
        _text((WIDTH + _LEFT) / 2, HEIGHT - 8, x_label, anchor="middle"),
        (
            f'<g transform="translate(14 {HEIGHT / 2}) rotate(-90)">'
            f"{_text(0, 0, y_label, anchor='middle')}</g>"
        ),
    ]
    for tick in y_ticks:
        _, y = place(x_least, tick)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        parts.append(_text(_LEFT - 6, y + 4, f"{tick:,.10g}", anchor="end"))
    for x_value in sorted({x for x, _ in points}):
        x, y = place(x_value, 0)
        parts.append(_text(x, y + 16, f"{x_value:g}", anchor="middle"))
    for (name, line), colour in zip(lines.items(), _colours(len(lines)), strict=True):
        places = [place(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (_, value) in zip(places, line, strict=True):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">'
                f"<title>{escape(name)}: {value:,.6g}</title></circle>"
            )
    return "\n".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """Which colour is whose, as HTML."""
    return " ".join(
        f'<span><svg width="14" height="10" aria-hidden="true"><rect width="14" height="4" y="3" '
        f'fill="{colour}"/></svg> {escape(name)}</span>'
        for name, colour in zip(names, _colours(len(names)), strict=True)
    )


def ticks(most: float) -> list[float]:
    """Round numbers from zero to the first one that is not below `most`; four to six of them."""
    if most <= 0:
        return [0.0, 1.0]
    rough = most / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(most / step - 1e-9) + 1)]


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "", size: int = 0
) -> str:
    extra = (f' font-weight="{weight}"' if weight else "") + (
        f' font-size="{size}"' if size else ""
    )
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'
