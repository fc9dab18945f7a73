"""Play scenarios, one after the other: each on a stage of its own, which is gone afterwards."""

from __future__ import annotations

import pkgutil
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import guests.adversaries
from ipc.codec import Record
from ipc.errors import Disconnected, ExitCode, OperatorError
from ipc.jail import Mode
from tools.interrupts import Interrupts
from tools.scenario.model import Scene
from tools.scenario.scenario import Outcome, Scenario
from tools.scenario.stage import Command, Player, Stage, adversary


def play(
    scenario: Scenario,
    *,
    defence: bool,
    seed: int,
    cache: Path,
    interrupts: Interrupts,
    tell: Callable[[str], None] = lambda _line: None,
    watch: Callable[[Scene], None] = lambda _scene: None,
    command: Command | None = None,
) -> Outcome:
    """One scenario from beginning to end.  A cluster that can't be started makes it unknown."""
    # Short: sockets lie in it.
    folder = Path(tempfile.mkdtemp(prefix="tmem-scn-"))
    began_at = time.monotonic()
    stage = Stage(folder, cache, defence, seed, interrupts, tell, watch, command)
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
    return Outcome(scenario, defence, seed, seconds, stage.tally, stage.events, stage.scenes)


def adversaries() -> list[str]:
    """What can be run by hand; `raw` is what they have in common."""
    found = pkgutil.iter_modules(guests.adversaries.__path__)
    return sorted({module.name for module in found} - {"raw"})


def attack(
    noun: str, parameters: Record, *, jail: Mode, seed: int, interrupts: Interrupts
) -> tuple[Record, list[str]]:
    """Run one adversary by hand, in a guest of a cluster that has no other; its report, and what
    went wrong."""
    if noun not in adversaries():
        raise OperatorError(
            f"there is no adversary {noun!r}; there are {', '.join(adversaries())}", ExitCode.USAGE
        )
    folder = Path(tempfile.mkdtemp(prefix="tmem-scn-"))
    stage = Stage(folder, folder / "cache", True, seed, interrupts)
    try:
        guest = Player("mallory", adversary(noun), cleancache=True)
        with stage.cluster(guest, jail=jail) as world:
            return world.play("mallory", **parameters), stage.tally.problems
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def play_all(
    scenarios: list[Scenario],
    *,
    defence: bool,
    seed: int,
    interrupts: Interrupts,
    announce: Callable[[Scenario], None],
    tell: Callable[[str], None],
    watch: Callable[[Scene], None] = lambda _scene: None,
    command: Command | None = None,
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
                watch=watch,
                command=command,
            )
