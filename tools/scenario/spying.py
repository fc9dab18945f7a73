"""Spying: learning what is another guest's.

`alpha` holds pages that nobody else may have; `mallory` wants to know them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final

from ipc.codec import Record
from tools.scenario.model import Figure
from tools.scenario.scenario import Scenario
from tools.scenario.stage import JAILED, MIB, Player, Stage, World, adversary
from tools.scenario.timing import Batch, Distinguished, distinguish

_PAGES: Final = 32
_SECRET: Final[dict[str, Any]] = {"owner": "alpha", "pages": _PAGES, "kind": "persistent"}
_TWINS: Final = 256
_TRIALS: Final = 200
_BATCHES_MAX: Final = 41
"""8,000 trials and a batch to learn from: 1,400 are enough where there is nothing to be told, and a
few hundred where there is much."""


def _spy(stage: Stage, noun: str, by: tuple[str, ...], parameters: Any, *, jailed: bool) -> None:
    """Alpha has secrets, mallory tries its program, alpha's pages are still right."""
    cast = (Player("alpha"), Player("mallory", adversary(noun)))
    with stage.cluster(*cast, jail=stage.jail if jailed else None) as world:
        pool = world.play("alpha", task="fill", **_SECRET).get("pool", 0)
        world.attack("mallory", by=by, **parameters(world))
        world.check("alpha", pool=pool, **_SECRET)


def _foreign_pools(stage: Stage) -> None:
    by = ("no_such_pool", "nothing there")
    _spy(stage, "poolprobe", by, lambda _world: {"owner": "alpha"}, jailed=False)


def _object_names(stage: Stage) -> None:
    def parameters(world: World) -> dict[str, Any]:
        return {"cluster": world.cluster.plan.name, "owner": "alpha"}

    _spy(stage, "objectnames", JAILED, parameters, jailed=True)


def _debugger(stage: Stage) -> None:
    _spy(stage, "debugger", JAILED, lambda world: {"pid": world.pid("alpha")}, jailed=True)


def _proc_files(stage: Stage) -> None:
    _spy(stage, "procfiles", JAILED, lambda world: {"pid": world.pid("alpha")}, jailed=True)


def _run_directory(stage: Stage) -> None:
    def parameters(world: World) -> dict[str, Any]:
        return {"folder": os.fspath(world.directory.path), "victim": "alpha"}

    _spy(stage, "rundirectory", JAILED, parameters, jailed=True)


def _twin_timing(stage: Stage) -> None:
    shared = _time_twins(stage, "all", {})
    if not shared.leaks:
        # So that it is told nothing elsewhere would prove nothing.
        stage.problem("too much else goes on: put times tell nothing even where pages are shared")
    if not stage.defence:
        _count(stage, shared)
        return
    for scope, groups in (("group", {"alpha": "ours", "mallory": "theirs"}), ("off", {})):
        found = _time_twins(stage, scope, groups)
        _count(stage, found)
        if not (found.leaks or found.tells_nothing):
            stage.problem(f"sharing {scope}: too much else goes on to tell 50 % from 55 %")


def _count(stage: Stage, found: Distinguished) -> None:
    stage.tally.attempts += found.trials
    if found.leaks:
        stage.tally.succeeded += round((found.accuracy - 0.5) * found.trials)
    elif found.tells_nothing:
        stage.tally.caught += found.trials


def _time_twins(stage: Stage, scope: str, groups: dict[str, str]) -> Distinguished:
    """How well mallory tells by the times of its puts what alpha holds."""
    told: list[Record] = [
        {"verb": "set", "guest": name, "sharing": scope}
        | ({"group": groups[name]} if groups else {})
        for name in ("alpha", "mallory")
    ]
    cast = (Player("alpha"), Player("mallory", adversary("twintiming")))
    with stage.cluster(*cast, arena_bytes=8 * MIB, questions=told) as world:
        file: dict[str, Any] = {"owner": "alpha", "pages": _TWINS}
        pool = world.play("alpha", task="fill", **file).get("pool", 0)
        found = distinguish(_batches(world, file))
        # An ephemeral get takes the page: last of all.
        world.check("alpha", pool=pool, **file)
    stage.tally.figures[f"sharing {scope}"] = Figure(
        str(found),
        {"accuracy": found.accuracy, "error": found.error, "trials": found.trials},
    )
    stage.say(f"mallory, sharing {scope}: {found}")
    return found


def _batches(world: World, file: dict[str, Any]) -> Iterator[Batch]:
    for _ in range(_BATCHES_MAX):
        report = world.play("mallory", trials=_TRIALS, **file)
        if not report.get("labels"):
            return
        yield report["labels"], report["differences_ns"]


SCENARIOS: Final = (
    Scenario(
        "foreign-pools",
        "spying",
        "poolprobe",
        "get, flush and destroy under every pool id that another guest could have",
        "pool ids are a guest's own, and no field of a call names another guest",
        None,
        "In Xen a pool id was looked up in the caller's own table, too, but negative ids were not "
        "checked everywhere (CVE-2012-6035, 6036).",
        _foreign_pools,
    ),
    Scenario(
        "object-names",
        "spying",
        "objectnames",
        "list /dev/shm and /dev/mqueue, open what is there, guess the names of queues",
        "the jail, and names that are random and removed once both sides have the object",
        "the guest runs without a jail",
        "The kernel's objects have names in a folder that everybody may list. A guest of the same "
        "user could open them all.",
        _object_names,
    ),
    Scenario(
        "debugger",
        "spying",
        "debugger",
        "attach to another guest with ptrace, read its memory, send it signals",
        "the jail: no such system calls, processes that are not dumpable, a user for each guest",
        "the guest runs without a jail",
        "All guests were processes of one user, and one user may debug its processes.",
        _debugger,
    ),
    Scenario(
        "proc-files",
        "spying",
        "procfiles",
        "read /proc/PID/mem, maps, environ and descriptors of another guest",
        "the jail: no file is opened any more",
        "the guest runs without a jail",
        "The same as a debugger, with files.",
        _proc_files,
    ),
    Scenario(
        "run-directory",
        "spying",
        "rundirectory",
        "read others' disks, tokens and logs in the run directory, ask the administrator's sockets",
        "the jail, and a directory that lets guests through to the door and to nothing else",
        "the guest runs without a jail",
        "Who can ask the control socket is the administrator. It is a stream, and a jailed guest "
        "can make no stream sockets.",
        _run_directory,
    ),
    Scenario(
        "twin-timing",
        "spying",
        "twintiming",
        "tell by the time of a put whether another guest holds a page of the same content",
        "the scope of sharing: off, or a group that trusts each other",
        "equal pages of all guests are one (sharing all)",
        "Deduplication was taken out of Xen for this. Of each pair of puts one is of content that "
        "alpha holds, and mallory has to say which, by their times. It learns from some pairs how "
        "to tell and is tried on the next ones, until it is certain (a thousand to one) that it "
        "does better than a coin, or that it does not. Outside of the trust group it must not; and "
        "it must where pages are shared (scope all), or the measurement proves nothing.",
        _twin_timing,
    ),
)
