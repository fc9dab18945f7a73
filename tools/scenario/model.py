"""What a scenario is, what it counts, and what follows from the counts.

    held      the attack was tried, the defence was seen to act, nobody was harmed
    broken    the attacker got what it wanted, or a victim read a wrong page or lost one
    unknown   nothing was tried, nobody looked at a victim's pages, or something else went wrong

Harm is harm whatever else went wrong, so `broken` goes before `unknown`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from ipc.codec import Record
from ipc.errors import ExitCode

if TYPE_CHECKING:
    from tools.scenario.stage import Stage

Verdict = Literal["held", "broken", "unknown"]
KINDS: Final = ("poisoning", "spying", "denial", "breakout")


@dataclass(frozen=True)
class Scenario:
    """One attack with a name.  `tries` and `stops` are for people; `off` says what `--defence off`
    takes away, None if there is no such switch and the attack is only shown to fail.  With
    `must_catch` an attack that nobody was seen to catch proves nothing.  `adversary` is the module
    in `guests.adversaries`."""

    name: str
    kind: str
    adversary: str
    tries: str
    stops: str
    off: str | None
    explain: str
    run: Callable[[Stage], None]
    must_catch: bool = True


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
    figures: dict[str, Any] = field(default_factory=dict)
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


@dataclass(frozen=True)
class Outcome:
    """A run that has ended."""

    scenario: Scenario
    defence: bool
    seed: int
    seconds: float
    tally: Tally
    events: list[str]
    scenes: list[Scene] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """What follows from the tally."""
        return verdict(self.tally, must_catch=self.scenario.must_catch)

    def record(self) -> Record:
        """For `--json`."""
        return {
            "scenario": self.scenario.name,
            "kind": self.scenario.kind,
            "defence": "on" if self.defence else "off",
            "seed": self.seed,
            **asdict(self.tally),
            "events": self.events,
            "seconds": round(self.seconds, 2),
            "verdict": self.verdict,
        }


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
