"""What a scenario counts, what it shows, and what follows from the counts.

    held      the attack was tried, the defence was seen to act, nobody was harmed
    broken    the attacker got what it wanted, or a victim read a wrong page or lost one
    unknown   nothing was tried, nobody looked at a victim's pages, or something else went wrong

Harm is harm whatever else went wrong, so `broken` goes before `unknown`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ipc.errors import ExitCode

Verdict = Literal["held", "broken", "unknown"]


@dataclass(frozen=True)
class Figure:
    """What was measured, for people and for programs."""

    text: str
    measured: dict[str, Any]

    def __str__(self) -> str:
        return self.text


@dataclass
class Tally:
    """Counts of one run."""

    attempts: int = 0
    succeeded: int = 0
    """Attempts by which the attacker got what it wanted."""
    caught: int = 0
    """Attempts that a defence refused or found out."""
    victim_checks: int = 0
    """Pages (or calls) of victims that were compared with what they had to be."""
    victim_mismatches: int = 0
    """Those that were not, and persistent pages that were lost."""
    problems: list[str] = field(default_factory=list)
    """Why it can't be told."""
    figures: dict[str, Figure] = field(default_factory=dict)
    """What else was measured."""


@dataclass(frozen=True)
class Part:
    """One guest in a scene, in sums since the beginning of its act."""

    name: str
    role: str
    poisoned_pages: int = 0
    read_files: int = 0
    wrong_files: int = 0
    tmem_pages: int = 0
    caught_pages: int = 0


@dataclass(frozen=True)
class Scene:
    """A moment of a scenario that can be watched; an act is one cluster from start to end."""

    act: str
    at_seconds: float
    parts: tuple[Part, ...]
    said: tuple[str, ...] = ()
    """The last that was said."""
    mark: str = ""
    """What has begun with it."""

    @property
    def poisoned(self) -> int:
        """Wrong pages that the pool took."""
        return sum(part.poisoned_pages for part in self.parts)

    @property
    def served(self) -> int:
        """Files that a victim read and that were not what they had to be."""
        return sum(part.wrong_files for part in self.parts)

    @property
    def caught(self) -> int:
        """Wrong pages that a victim got and did not believe."""
        return sum(part.caught_pages for part in self.parts)


def verdict(tally: Tally, *, must_catch: bool) -> Verdict:
    """What follows."""
    if tally.succeeded or tally.victim_mismatches:
        return "broken"
    if tally.problems or not tally.attempts or not tally.victim_checks:
        return "unknown"
    return "held" if tally.caught or not must_catch else "unknown"


_EXIT_CODES: Final = {
    "held": ExitCode.OK,
    "broken": ExitCode.VIOLATED,
    "unknown": ExitCode.INCONCLUSIVE,
}


def exit_code(verdicts: list[Verdict]) -> ExitCode:
    """0 if all held, 1 if one is broken, else 2: the worst that is certain goes first."""
    if "broken" in verdicts:
        return ExitCode.VIOLATED
    return max((_EXIT_CODES[one] for one in verdicts), default=ExitCode.INCONCLUSIVE)
