"""What a scenario is, and one that was played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Final

from ipc.codec import Record
from tools.scenario.model import Scene, Tally, Verdict, verdict
from tools.scenario.stage import Stage

KINDS: Final = ("poisoning", "spying", "denial", "breakout")


@dataclass(frozen=True)
class Scenario:
    """One attack with a name.  `tries` and `stops` are for people; `off` says what `--defence off`
    takes away, None if there is no such switch and the attack is only shown to fail.  With
    `must_catch` an attack that nobody was seen to catch proves nothing.  `adversary` is the module
    in `guests.adversaries`.  One that is `watched` has scenes, and so a report."""

    name: str
    kind: str
    adversary: str
    tries: str
    stops: str
    off: str | None
    explain: str
    run: Callable[[Stage], None]
    must_catch: bool = True
    watched: bool = False


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
