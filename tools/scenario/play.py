"""Play scenarios, one after the other: each on a stage of its own, which is gone afterwards."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ipc.errors import Disconnected, OperatorError
from tools.interrupts import Interrupts
from tools.scenario.model import Outcome, Scenario
from tools.scenario.stage import Stage


def play(
    scenario: Scenario,
    *,
    defence: bool,
    seed: int,
    cache: Path,
    interrupts: Interrupts,
    tell: Callable[[str], None] = lambda _line: None,
) -> Outcome:
    """One scenario from beginning to end.  A cluster that can't be started makes it unknown."""
    # Short: sockets lie in it.
    folder = Path(tempfile.mkdtemp(prefix="tmem-scn-"))
    began_at = time.monotonic()
    stage = Stage(folder, cache, defence, seed, interrupts, tell)
    try:
        try:
            scenario.run(stage)
        except Disconnected as error:
            stage.problem(f"no answer: {error}")
        except OperatorError as error:
            # A cluster that does not come up says nothing of the next one.
            stage.problem(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - began_at
    return Outcome(scenario, defence, seed, seconds, stage.tally, stage.events)


def play_all(
    scenarios: list[Scenario],
    *,
    defence: bool,
    seed: int,
    interrupts: Interrupts,
    announce: Callable[[Scenario], None],
    tell: Callable[[str], None],
) -> Iterator[Outcome]:
    """Scenarios in turn; what they have in common is made once."""
    with tempfile.TemporaryDirectory(prefix="tmem-scn-cache-") as cache:
        for scenario in scenarios:
            announce(scenario)
            yield play(
                scenario,
                defence=defence,
                seed=seed,
                cache=Path(cache),
                interrupts=interrupts,
                tell=tell,
            )
