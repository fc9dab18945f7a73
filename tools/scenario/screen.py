"""The poisoned cluster as it is played: a table of guests on a terminal, else a line a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tools.scenario.model import Part, Scene

_LINE_SECONDS: Final = 1.0
_HEADER: Final = (
    "guest",
    "role",
    "wrong pages put",
    "files read",
    "pages from tmem",
    "read wrong",
    "caught",
)


class LineScreen:
    """A line a second; for logs and for people who redirect."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._act = ""
        self._next_at_seconds = 0.0

    def watch(self, scene: Scene) -> None:
        """Print how things stand, if it is time."""
        if scene.act != self._act:
            self._act, self._next_at_seconds = scene.act, 0.0
            print(f"  {scene.act}:", file=self._stream)
        if scene.at_seconds < self._next_at_seconds:
            return
        self._next_at_seconds = scene.at_seconds + _LINE_SECONDS
        print(f"    {line(scene)}", file=self._stream, flush=True)

    def end(self) -> None:
        """Whatever is printed comes after the last line anyway."""


def line(scene: Scene) -> str:
    """A scene in one line."""
    victims = ", ".join(
        f"{part.name} {part.read_files:,}" for part in scene.parts if part.role == "victim"
    )
    return (
        f"{scene.at_seconds:4.1f} s  poisoned {scene.poisoned:5,}  served {scene.served:4,}  "
        f"caught {scene.caught:5,}  files read: {victims}"
    )


class LiveScreen:
    """A table that changes."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def watch(self, scene: Scene) -> None:
        """Show how things stand."""
        self._live.start()
        self._live.update(picture(scene), refresh=True)

    def end(self) -> None:
        """The table stays as it is, and what is printed comes below it."""
        self._live.stop()


def picture(scene: Scene) -> Group:
    """What is on the screen."""
    table = Table(title=f"{scene.act}, {scene.at_seconds:.1f} s", title_justify="left")
    for number, word in enumerate(_HEADER):
        table.add_column(word, justify="right" if number > 1 else "left")
    for part in scene.parts:
        table.add_row(*_cells(part))
    said = Text("\n".join(scene.said), style="dim", overflow="ellipsis", no_wrap=True)
    return Group(table, said)


def _cells(part: Part) -> list[Any]:
    if part.role == "attacker":
        return [part.name, Text(part.role, "red"), f"{part.poisoned_pages:,}", "", "", "", ""]
    wrong = Text(f"{part.wrong_files:,}", "bold red" if part.wrong_files else "green")
    caught = Text(f"{part.caught_pages:,}", "bold yellow" if part.caught_pages else "")
    return [
        part.name,
        part.role,
        "",
        f"{part.read_files:,}",
        f"{part.tmem_pages:,}",
        wrong,
        caught,
    ]


@contextmanager
def screen(stream: TextIO) -> Iterator[LineScreen | LiveScreen]:
    """The one that fits the stream."""
    if not stream.isatty():
        yield LineScreen(stream)
        return
    shown = LiveScreen(Live(console=Console(file=stream), auto_refresh=False))
    try:
        yield shown
    finally:
        shown.end()
