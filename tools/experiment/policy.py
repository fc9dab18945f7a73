"""Which way of dividing memory reads least from disk: `tmem experiment policy`.

Four guests with different curves over one arena that is too small for all of them:

    stream  reads on and on, nothing twice: no memory helps it
    loop    the same pages in a circle, a quarter more than its share: with all of them no read at
            all, with one page less nothing but reads
    zipf    some pages often, most seldom: every page helps a little less than the one before
    idle    reads a few pages at the start and now and then again

The same reads are done under each policy, the disk reads are counted:

    greedy       the oldest page of all goes (Xen with its default weights)
    static       equal weights, targets by weight
    scheduled    the memory scheduler
    best_static  the best there is without moving memory: the arena is cut into parts and every way
                 of giving them to the guests is run, with the parts as weights.  Left out are only
                 divisions that give memory to a guest which reads as much without any

Learning counts: every run starts with nothing and its first reads are counted too.  One process,
no clock, no randomness but the seed's: the same figures on every machine.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate, product
from typing import Any, Final

from hypervisor.arena import layout, private_arena
from hypervisor.machine import Machine
from hypervisor.pools import Settings
from ipc.channel import Channel
from ipc.local import LocalChannel
from ipc.window import Window
from tools.experiment.guest import ExperimentGuest, Reads

FEWER_LEAST: Final = 0.35
"""`scheduled` is to read at least that part less than `greedy`."""

OVER_BEST_MOST: Final = 0.10
"""And at most that part more than the best static division."""

_CHUNK: Final = 8
"""Pages that a sequential reader asks for at a time."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How large and how long."""

    arena_frames: int = 2048
    guest_frames: int = 256
    turns: int = 480
    parts: int = 16
    """Into which the arena is cut for the static divisions."""
    eviction: str = "clock"
    seed: int = 20_261_125

    @property
    def share(self) -> int:
        """An equal part of the arena."""
        return self.arena_frames // 4


QUICK: Final = Plan(arena_frames=1024, guest_frames=128, turns=300, parts=12)


# --- workloads: page numbers, without end


def _stream() -> Reads:
    at = 0
    while True:
        yield at, _CHUNK
        at += _CHUNK


def _loop(pages: int) -> Reads:
    at = 0
    while True:
        count = min(_CHUNK, pages - at)
        yield at, count
        at = (at + count) % pages


def _zipf(pages: int, exponent: float, rng: random.Random) -> Reads:
    weights = list(accumulate((rank + 1) ** -exponent for rank in range(pages)))
    order = list(range(pages))
    rng.shuffle(order)
    while True:
        for page in rng.choices(order, cum_weights=weights, k=1024):
            yield page, 1


def _idle() -> Reads:
    while True:
        for at in range(0, 64, _CHUNK):
            yield at, _CHUNK
        for _ in range(10_000):
            yield 0, 0


@dataclass(frozen=True)
class Role:
    """One of the four."""

    reads: Callable[[], Reads]
    pages_a_turn: int


def roles(plan: Plan) -> dict[str, Role]:
    """The guests by name."""
    # What tmem must hold for the loop is what the guest's own memory doesn't.
    loop_pages = plan.guest_frames + plan.share * 5 // 4
    zipf_pages = plan.guest_frames + plan.share * 5 // 2
    return {
        "stream": Role(_stream, plan.share // 8),
        "loop": Role(lambda: _loop(loop_pages), plan.share // 12),
        "zipf": Role(lambda: _zipf(zipf_pages, 0.6, random.Random(plan.seed)), plan.share // 3),
        "idle": Role(_idle, 8),
    }


# --- running


@dataclass(frozen=True)
class Outcome:
    """Disk reads of one run by guest, and what else it says."""

    reads: dict[str, int]
    tmem_hits: dict[str, int]
    targets: dict[str, int]
    """Target in pages at the end."""
    verified_pages: int
    mismatches: int
    periods: int

    @property
    def total(self) -> int:
        """Disk reads of all."""
        return sum(self.reads.values())


def leaf_key(oid: bytes, leaf_number: int) -> int:
    """The hypervisor's own hash differs by process; samples here are to be the same in all."""
    digest = hashlib.blake2b(oid + leaf_number.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def run(
    plan: Plan,
    mode: str,
    chosen: Mapping[str, Role],
    settings: dict[str, Settings],
    frames: int,
) -> Outcome:
    """All turns of some guests over one arena."""
    machine = Machine(
        private_arena(layout(frames).end),
        policy=plan.eviction,
        scheduling=mode,
        settings=settings,
        leaf_key=leaf_key,
    )
    guests = [
        ExperimentGuest(
            name,
            plan.guest_frames,
            number,
            role.reads(),
            role.pages_a_turn,
            _connector(machine, name, number + 1),
        )
        for number, (name, role) in enumerate(chosen.items())
    ]
    for _ in range(plan.turns):
        for guest in guests:
            guest.turn()
    return Outcome(
        {guest.name: guest.disk_reads for guest in guests},
        {guest.name: guest.tmem_hits for guest in guests},
        {
            name: sum(member.target_bytes for member in client.members.values()) // 4096
            for name, client in machine.clients.items()
        },
        sum(guest.verified_pages for guest in guests),
        sum(guest.mismatches for guest in guests),
        machine.balance.periods,
    )


def _connector(machine: Machine, name: str, pid: int) -> Callable[[], Channel]:
    def connect() -> Channel:
        client = machine.attach(name, pid, 1, 0)
        assert client is not None

        def execute(request: bytes, window: Window) -> bytes:
            return machine.execute(client, request, window)

        return LocalChannel(execute, generation=machine.generation)

    return connect


# --- the best static division


def helped(plan: Plan) -> list[str]:
    """The guests that read less alone with all of the arena than without any."""
    names: list[str] = []
    for name, role in roles(plan).items():
        without, with_all = (
            run(plan, "greedy", {name: role}, {name: Settings(frozen=frozen)}, plan.arena_frames)
            for frozen in (True, False)
        )
        if with_all.total < without.total:
            names.append(name)
    return names


def divisions(guests: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways of giving all parts to guests."""
    for chosen in product(range(parts + 1), repeat=guests - 1):
        if sum(chosen) <= parts:
            yield (*chosen, parts - sum(chosen))


def static_runs(plan: Plan, say: Say) -> dict[tuple[int, ...], Outcome]:
    """Every division of the arena among those whom memory helps; the others have nothing."""
    everyone = roles(plan)
    useful = helped(plan)
    outcomes: dict[tuple[int, ...], Outcome] = {}
    for division in divisions(len(useful), plan.parts):
        say(f"running the static division {division} between {' and '.join(useful)}")
        parts = dict(zip(useful, division, strict=True))
        settings = {name: Settings(weight=parts.get(name, 0)) for name in everyone}
        whole = tuple(settings[name].weight for name in everyone)
        outcomes[whole] = run(plan, "static", everyone, settings, plan.arena_frames)
    return outcomes


# --- the whole


def measure(plan: Plan, say: Say) -> dict[str, Any]:
    """The document of the experiment."""
    everyone = roles(plan)
    outcomes: dict[str, Outcome] = {}
    for mode in ("greedy", "static", "scheduled"):
        say(f"running {mode}")
        outcomes[mode] = run(plan, mode, everyone, {}, plan.arena_frames)
    by_division = static_runs(plan, say)
    best = min(by_division, key=lambda division: by_division[division].total)
    outcomes["best_static"] = by_division[best]
    reads = {mode: outcome.total for mode, outcome in outcomes.items()}
    return {
        "reads": reads,
        "fewer_than_greedy": 1 - reads["scheduled"] / reads["greedy"],
        "over_best_static": reads["scheduled"] / reads["best_static"] - 1,
        "holds": reads["scheduled"] <= (1 - FEWER_LEAST) * reads["greedy"]
        and reads["scheduled"] <= (1 + OVER_BEST_MOST) * reads["best_static"],
        "verified_pages": sum(outcome.verified_pages for outcome in outcomes.values()),
        "mismatches": sum(outcome.mismatches for outcome in outcomes.values()),
        "runs": {
            mode: {
                "reads": outcome.reads,
                "tmem_hits": outcome.tmem_hits,
                "target_pages": outcome.targets,
                "periods": outcome.periods,
            }
            for mode, outcome in outcomes.items()
        },
        "best_division": dict(zip(everyone, best, strict=True)),
        "divisions": [
            {"parts": dict(zip(everyone, division, strict=True)), "reads": outcome.total}
            for division, outcome in by_division.items()
        ],
        "plan": asdict(plan),
    }
