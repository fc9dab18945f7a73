"""Denial: keeping others from what is theirs.

`alpha` works all the time: it puts pages, fetches them and compares; a persistent page that is lost
or refused, a wrong page and work that does not go on are harm.  `mallory` is a nuisance.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from hypervisor.audit import BURST_LINES, LINES_PER_SECOND
from ipc.codec import Record
from tools.scenario.model import Figure
from tools.scenario.scenario import Scenario
from tools.scenario.stage import JAILED, MIB, Grant, Player, Stage, World, adversary

_SECONDS: Final = 2.0
_WORK: Final[dict[str, Any]] = {"task": "work", "pages": 32, "kind": "persistent"}
_ROUNDS_LEAST: Final = 2
"""A victim that gets through fewer rounds in the time of an attack is starved."""
_HIT_SHARE_LEAST: Final = 0.9
"""Of its undisturbed hits a victim keeps so many."""


def _cast(noun: str) -> tuple[Player, Player]:
    return Player("alpha"), Player("mallory", adversary(noun))


def _disturb(stage: Stage, world: World, by: tuple[str, ...] = (), **parameters: Any) -> Record:
    """Alpha works before, and while mallory does what it does; both are counted."""
    before = world.play("alpha", seconds=_SECONDS / 2, rounds=10**6, **_WORK)
    pool = before.get("pool", 0)
    world.begin("mallory", **parameters)
    during = world.play("alpha", seconds=_SECONDS, rounds=10**6, pool=pool, version=10**6, **_WORK)
    report = world.finish("mallory")
    world.count_attack("mallory", report, by=by)
    for found in (before, during):
        world.count_check("alpha", found)
        if found.get("refused", 0):
            stage.tally.succeeded += found["refused"]
            stage.say(f"alpha: {found['refused']} puts were refused: {found.get('why')}")
    rate = [
        found.get("rounds", 0) / seconds
        for found, seconds in ((before, _SECONDS / 2), (during, _SECONDS))
    ]
    stage.tally.figures["alpha's rounds a second"] = Figure(
        f"{rate[0]:.0f} alone, {rate[1]:.0f} disturbed", {"alone": rate[0], "disturbed": rate[1]}
    )
    if during.get("rounds", 0) < _ROUNDS_LEAST:
        stage.tally.succeeded += 1
        stage.say("alpha is starved")
    return report


def _nuisance(noun: str, **parameters: Any) -> Any:
    def run(stage: Stage) -> None:
        with stage.cluster(*_cast(noun)) as world:
            _disturb(stage, world, seconds=_SECONDS, **parameters)

    return run


def _mute(stage: Stage) -> None:
    with stage.cluster(*_cast("mute"), hypervisor={"transport": "mqueue"}) as world:
        _disturb(stage, world, seconds=_SECONDS)
        unread = world.ask("stats")["guests"]["mallory"]["unread_replies"]
        stage.say(f"hypervisor: {unread:,} replies found mallory's queue full and were dropped")
        stage.tally.caught += unread


def _churn(stage: Stage) -> None:
    uuid = stage.random.randbytes(16)
    with stage.cluster(*_cast("churn"), grants=[Grant("mallory", uuid)]) as world:
        report = _disturb(stage, world, uuid=uuid.hex(), seconds=_SECONDS)
        stage.tally.caught += report.get("caught", 0)
        # Whoever comes now still gets a pool.
        world.play("alpha", task="drop", pages=1)


def _hoard(stage: Stage) -> None:
    settings: list[Record] = (
        [
            {"verb": "set", "guest": "mallory", "cap_bytes": MIB},
            {"verb": "set", "guest": "alpha", "reserve_bytes": 2 * MIB},
        ]
        if stage.defence
        else [
            # Entitled to nearly all of it: as good as no share at all.
            {"verb": "set", "guest": "mallory", "weight": 65535, "borrow": True},
            {"verb": "set", "guest": "alpha", "weight": 1},
        ]
    )
    file: dict[str, Any] = {"kind": "persistent", "pages": 256}
    with stage.cluster(*_cast("hoard"), arena_bytes=4 * MIB, questions=settings) as world:
        report = world.play("mallory", pages=2048)
        world.count_attack("mallory", report, by=("over_allotment", "no_memory"))
        stage.say(f"mallory holds {report.get('kept', 0)} persistent pages of about 1,000")
        found = world.play("alpha", task="fill", **file)
        refused = found.get("refused", 0)
        stage.say(f"alpha: {found.get('kept', 0)} puts of 256 were kept, {refused} refused")
        stage.tally.succeeded += refused
        if kept := found.get("kept", 0):
            world.check("alpha", pool=found["pool"], **{**file, "pages": kept})


def _thrash(stage: Stage) -> None:
    pages = 256
    settings: list[Record] = []
    options: Mapping[str, Any] = {"scheduling": "greedy"}
    if stage.defence:
        settings = [{"verb": "set", "guest": "alpha", "reserve_bytes": (pages + 64) * 4096}]
        options = {"scheduling": "scheduled"}
    file: dict[str, Any] = {"task": "work", "pages": pages, "rounds": 8, "pause_seconds": 0.15}
    with stage.cluster(
        *_cast("thrash"), arena_bytes=4 * MIB, questions=settings, hypervisor=options
    ) as world:
        alone = world.play("alpha", **file)
        world.begin("mallory", seconds=6.0)
        found = world.play("alpha", pool=alone.get("pool", 0), version=1000, **file)
        report = world.finish("mallory")
        shares = []
        for one in (alone, found):
            world.count_check("alpha", one)
            asked = one.get("checked", 0) + one.get("missing", 0)
            shares.append(one.get("checked", 0) / asked if asked else 0.0)
        stage.tally.figures["alpha's hits"] = Figure(
            f"{shares[0]:.1%} alone, {shares[1]:.1%} disturbed",
            {"alone": shares[0], "disturbed": shares[1]},
        )
        pools = world.ask("list", guest="mallory")["guests"]["mallory"]["pools"]
        gone = report.get("kept", 0) - sum(pool["pages"] for pool in pools)
        stage.say(
            f"mallory put {report.get('attempts', 0):,} pages that nobody wants; {gone:,} of them "
            "went for its next ones"
        )
        stage.tally.attempts += report.get("attempts", 0)
        stage.tally.caught += gone if stage.defence else 0
        if shares[1] < _HIT_SHARE_LEAST * shares[0]:
            stage.tally.succeeded += found.get("missing", 0)


def _log_spam(stage: Stage) -> None:
    calls = 4000
    with stage.cluster(*_cast("logspam")) as world:
        began_at = time.monotonic()
        report = _disturb(stage, world, calls=calls, seconds=_SECONDS)
        seconds = time.monotonic() - began_at
        about = [line for line in world.audit() if "guest=mallory" in line]
        lines, calls = len(about), report.get("attempts", 0)
        stage.tally.caught += calls - sum("event=fault" in line for line in about)
        thrown_out = ", then it was thrown out" if report.get("out") else ""
        stage.say(f"mallory made {calls:,} broken calls{thrown_out}")
        stage.say(f"audit log: {lines:,} lines, {sum(map(len, about)):,} bytes about it")
        # With each line there may be one for what was suppressed before it.
        bound = 2 * (BURST_LINES + LINES_PER_SECOND * seconds)
        stage.tally.succeeded += max(0, lines - round(bound))
        if not report.get("out"):
            stage.problem("mallory was not thrown out")


def _jailed(noun: str, by: tuple[str, ...], **parameters: Any) -> Any:
    """What only the jail stops."""

    def run(stage: Stage) -> None:
        with stage.cluster(*_cast(noun), jail=stage.jail) as world:
            told = dict(parameters)
            if "folder" in told:
                told["folder"] = str(world.directory.path)
            _disturb(stage, world, by=by, **told)

    return run


def _door_crowd(stage: Stage) -> None:
    with stage.cluster(*_cast("doorcrowd")) as world:
        _disturb(stage, world, seconds=_SECONDS)
        if "error" in world.ask("ping") or world.cluster.restarts:
            stage.tally.succeeded += 1
            stage.say("the hypervisor has died")
        refused = world.ask("stats")["audit"]["events"].get("refused", 0)
        stage.say(f"hypervisor: refused {refused:,} whom it had no room for")
        stage.tally.caught += refused


_NO_JAIL: Final = "the guest runs without a jail"
SCENARIOS: Final = (
    Scenario(
        "flood",
        "denial",
        "flood",
        "the dearest calls there are, without a pause",
        "turns: one bounded call of one guest at a time",
        None,
        "One thread serves everybody. It takes one call of each guest in turn and a call moves at "
        "most 64 pages, so a victim's call waits for one call of each other guest.",
        _nuisance("flood"),
        must_catch=False,
    ),
    Scenario(
        "giant-object",
        "denial",
        "giant",
        "an object with a leaf for every page, flushed by one call, again and again",
        "a flush disowns pages by one word; they are freed in slices",
        None,
        "Xen walked the whole object under a lock, and nobody else was served meanwhile.",
        _nuisance("giant", pages=900),
        must_catch=False,
    ),
    Scenario(
        "mute",
        "denial",
        "mute",
        "calls whose answers are never read, until the queue of answers is full",
        "the hypervisor waits for no guest: an answer that finds no room is dropped",
        None,
        "A server that waits for the slowest of its clients is a server of that client.",
        _mute,
    ),
    Scenario(
        "hoard",
        "denial",
        "hoard",
        "persistent pages, which nobody can evict, up to all that there is",
        "caps and reservations: persistent pages beyond them are refused (OVER_ALLOTMENT)",
        "mallory is entitled to everything, alpha to nothing",
        "A persistent page that was accepted may never be dropped. So all that helps is to refuse "
        "it in time.",
        _hoard,
    ),
    Scenario(
        "pool-churn",
        "denial",
        "churn",
        "make, join and leave pools without end, and have as many as it may",
        "numbers are used again, tables are bounded, shares are not computed for it",
        None,
        "In Xen 16 shared pools were all there were for everybody, and a sharer that left pinned "
        "the pool's memory.",
        _churn,
    ),
    Scenario(
        "thrashing",
        "denial",
        "thrash",
        "a stream of clean pages that nobody wants, to push out a neighbour's",
        "a reservation and the memory scheduler: the neighbour keeps 90 % of its hits",
        "greedy scheduling, no reservation: the oldest page of all goes, as in Xen",
        "Whoever puts most has most, when the oldest page goes. Here a guest's pages are worth "
        "what their hits save, and below its reservation nothing goes for others.",
        _thrash,
    ),
    Scenario(
        "door-crowd",
        "denial",
        "doorcrowd",
        "handshakes at the hypervisor's door that are never finished, as many as it can begin",
        "16 at a time, each with a deadline; one of the process goes that has the most",
        None,
        "Whoever may knock may do so without end. Seventeen at once were the end of a hypervisor: "
        "in its jail it could not import what it counts with.",
        _door_crowd,
    ),
    Scenario(
        "descriptors",
        "denial",
        "descriptors",
        "descriptors without end, with the limit raised",
        "the jail: at most 256, for good",
        _NO_JAIL,
        "Open files are the whole machine's.",
        _jailed("descriptors", ("too many open files", "limit can't be raised", *JAILED)),
    ),
    Scenario(
        "queues",
        "denial",
        "queues",
        "message queues of its own, of which the machine has 256",
        "the jail: no queue can be made",
        _NO_JAIL,
        "The kernel's queues are few, and every guest needs two.",
        _jailed("queues", JAILED),
    ),
    Scenario(
        "fork-bomb",
        "denial",
        "forkbomb",
        "processes and threads (a few: what is shown is that nothing stops it)",
        "the jail: no process and no thread can be started",
        _NO_JAIL,
        "A guest is one process with one thread.",
        _jailed("forkbomb", (*JAILED, "can't start new thread")),
    ),
    Scenario(
        "disk-full",
        "denial",
        "diskfill",
        "files in the run directory, and its own made larger than the host's disk",
        "the jail: no file can be made, none of its own can grow beyond a bound",
        _NO_JAIL,
        "The run directory has everybody's logs and disks. Files are sparse and cut off again.",
        _jailed("diskfill", (*JAILED, "file too large"), folder=""),
    ),
    Scenario(
        "log-spam",
        "denial",
        "logspam",
        "broken calls without end, each of which has to be written down",
        "50 lines at once and 5 a second for each guest; after 256 broken calls it is out",
        None,
        "What a guest can have written as often as it likes fills a disk.",
        _log_spam,
    ),
)
