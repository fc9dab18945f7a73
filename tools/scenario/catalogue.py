"""All scenarios by name, in the order in which they are listed and run."""

from __future__ import annotations

from typing import Final

from ipc.errors import ExitCode, OperatorError
from tools.scenario import breakout, denial, poisoned, poisoning, spying
from tools.scenario.scenario import Scenario

SCENARIOS: Final[dict[str, Scenario]] = {
    scenario.name: scenario
    for scenario in (
        *poisoning.SCENARIOS,
        *spying.SCENARIOS,
        *denial.SCENARIOS,
        *breakout.SCENARIOS,
        poisoned.SCENARIO,
    )
}

UNTRIED: Final = (
    "malformed migration records: no guest moves to another hypervisor",
    "poison in a flash file: pages lie in memory only (bit-rot, arena-file)",
)
"""Attacks on what tmem does not have."""


def find(name: str) -> Scenario:
    """A scenario; OperatorError if there is none of this name."""
    scenario = SCENARIOS.get(name)
    if scenario is None:
        raise OperatorError(
            f"there is no scenario {name!r}; 'tmem scenario list' shows what there is",
            ExitCode.USAGE,
        )
    return scenario
