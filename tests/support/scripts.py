"""Golden scripts: commands of guests and of the administrator, and what the machine answered.

A script is text in blocks.  A block is commands, a line of three dashes, and the trace that they
must give; an empty line ends it.  Lines that begin with # are prose.  The machine lives on from
block to block, and its invariants are walked after every command.

    # 1.5 rule 4: a duplicate put replaces, or the old page goes and the put fails.
    guest a
    pool a/e ephemeral
    put a/e 7:0 old
    put a/e 7:0 new
    get a/e 7:0
    ---
    a attached
    a/e is pool 0
    a/e 7:0 stored
    a/e 7:0 replaced
    a/e 7:0 hit new

`a/e` is the pool that guest `a` calls `e`; a page is OBJECT:INDEX or OBJECT:INDEX+COUNT.  One word
for several pages is numbered: `put a/e 7:0+3 x` puts x0, x1 and x2.  Words name contents: `zero`,
`fill:x` (same-filled), `noise:x` (does not shrink), `lean:x` (shrinks to a fifth), `prose:x`
(shrinks more, the harder one tries), and any other is a text.  What was evicted by a command
follows it, indented; so does what the audit log says of a report.

    machine frames=N policy=P scheduling=S admission=off lend=on checksums=on   first, if at all
    guest G / depart G
    pool G/P ephemeral|persistent [shared=UUID] [priority=low|high]
    put G/P H W... [hints=low,active] [token=T] / get G/P H [keep]
    flush G/P H [token=T] / flush G/P OBJECT [token=T]
    destroy G/P / report G/P OBJECT:INDEX W
    batch G put|get|flush P H W [token=T]; P H W; ...
    lend G PAGES
    call G OP field=value... / message G BYTES / version G
    set G|G/P key=value... / freeze [G] / thaw [G] / schedule S
    allow G UUID [reader] / deny G UUID / grants
    quarantine G [deny] / quarantined / whence G/P OBJECT:INDEX / rot G/P OBJECT:INDEX
    host-flush [G] PAGES / host-destroy G[/P] / freeable
    balloon [G PAGES] / window G / writeback G / wait SECONDS
    restart / reap [PAGES] / compact / recompress
    pages G/P / charges / targets / sharers G/P / tokens G/P OBJECT... / frames / savings / counts G
    quiet COMMAND / repeat N COMMAND with {n}
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.support.notation import ScriptError
from tests.support.player import Player

SEPARATOR = "---"


class Block(NamedTuple):
    """Lines above the dashes, and below."""

    commands: list[str]
    trace: list[str]


def parse(text: str) -> list[Block]:
    """The blocks of a script."""
    blocks: list[Block] = []
    commands: list[str] = []
    trace: list[str] | None = None
    for line in [*text.splitlines(), ""]:
        if trace is None:
            if line == SEPARATOR:
                trace = []
            elif line or commands:
                commands.append(line)
        elif line:
            trace.append(line)
        else:
            blocks.append(Block(commands, trace))
            commands, trace = [], None
    if any(line and not line.startswith("#") for line in commands):
        raise ScriptError(f"no {SEPARATOR} after {commands[-2]!r}")
    return blocks


def render(blocks: Iterable[Block]) -> str:
    """The script of these blocks."""
    return "\n".join("\n".join([*block.commands, SEPARATOR, *block.trace, ""]) for block in blocks)


def play(text: str) -> list[Block]:
    """The blocks with the traces that they give."""
    player = Player()
    return [
        Block(
            block.commands,
            [line for command in block.commands for line in player.play(command)],
        )
        for block in parse(text)
    ]


def first_comment(path: Path) -> str:
    """The prose on top of a script."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)
