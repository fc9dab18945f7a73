"""Play scenarios, one after the other: each on a stage of its own, which is gone afterwards."""

from __future__ import annotations

import contextlib
import math
import pkgutil
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import guests.adversaries
from guests.adversary import WORKLOAD, parameters
from ipc.codec import Record
from ipc.errors import Disconnected, ExitCode, OperatorError
from ipc.jail import Mode
from tools.interrupts import Interrupts
from tools.scenario.model import Scene
from tools.scenario.scenario import Outcome, Scenario
from tools.scenario.stage import Command, Grant, Player, Stage, adversary
from tools.scenario.volume import make_volume
from tools.uuids import parse_uuid

ATTACKER: Final = "mallory"
_NUMBERS_END: Final = 2.0**63
"""What a record can carry."""


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
    noun: str,
    texts: Mapping[str, str],
    *,
    jail: Mode,
    nodes: int,
    grant: bool,
    seed: int,
    interrupts: Interrupts,
) -> tuple[Record, list[str]]:
    """Run one adversary by hand, in a guest of a cluster that has no other; its report, and what
    went wrong.  With `nodes` it is the last of so many that mount one volume; with `grant` it may
    write the shared pool of its parameter `uuid`."""
    told = typed(noun, texts)
    folder = Path(tempfile.mkdtemp(prefix="tmem-scn-"))
    stage = Stage(folder, folder / "cache", True, seed, interrupts)
    try:
        cast, grants = _cast(stage, noun, nodes)
        if grant:
            grants.append(_grant(told.get("uuid")))
        with stage.cluster(*cast, jail=jail, grants=grants) as world:
            world.expendable.add(ATTACKER)
            refusal = world.begin(ATTACKER, **told)
            if refusal is not None:
                raise OperatorError(f"{noun}: {_plain(refusal)}", ExitCode.USAGE)
            return world.finish(ATTACKER), stage.tally.problems
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cast(stage: Stage, noun: str, nodes: int) -> tuple[list[Player], list[Grant]]:
    if not nodes:
        return [Player(ATTACKER, adversary(noun))], []
    names = *(f"node{number}" for number in range(1, nodes)), ATTACKER
    volume = make_volume(stage, *names)
    cast = [volume.player(name) for name in names[:-1]]
    return [*cast, volume.player(ATTACKER, noun)], volume.grants()


def _grant(uuid: object) -> Grant:
    try:
        return Grant(ATTACKER, bytes.fromhex(parse_uuid(str(uuid))))
    except ValueError as error:
        raise OperatorError(f"--grant: {error}", ExitCode.USAGE) from None


def _plain(refusal: str) -> str:
    return refusal.removeprefix(f"{WORKLOAD}: ")


def typed(noun: str, texts: Mapping[str, str]) -> Record:
    """Parameters of an adversary as people write them; OperatorError for those that it does not
    know, and for numbers that are none."""
    if noun not in adversaries():
        raise OperatorError(
            f"there is no adversary {noun!r}; there are {', '.join(adversaries())}", ExitCode.USAGE
        )
    known = parameters(adversary(noun))
    if strange := texts.keys() - known.keys():
        takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
        raise OperatorError(
            f"{noun}: no parameter {', '.join(map(repr, sorted(strange)))}; {takes}",
            ExitCode.USAGE,
        )
    return {name: _value(f"{noun}: {name}", known[name], text) for name, text in texts.items()}


def _value(what: str, kind: str, text: str) -> int | float | str:
    if kind in ("text", "uuid"):
        return text
    with contextlib.suppress(ValueError):
        number = float(text)
        whole = int(text) if text.lstrip("-").isdecimal() else number
        if math.isfinite(number) and abs(number) < _NUMBERS_END:
            return whole
    raise OperatorError(f"{what}={text}: write a number, less than 2^63", ExitCode.USAGE)


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
