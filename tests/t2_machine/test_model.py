"""Random histories against the oracle (`tests.support.oracle`), in two ways.

Seeds go far: thousands of steps a second, deaths among them.  Hypothesis goes where it hurts: it
chooses each argument, and cuts a history that fails down to the few steps that matter.
`make model` does the first for as long as one likes.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import hypervisor.store
from hypervisor.accounting import OpCount
from hypervisor.arena import Arena
from hypervisor.balance import MODES
from hypervisor.eviction import POLICIES
from hypervisor.invariants import check
from hypervisor.lending import Lending, Loans
from hypervisor.machine import Machine
from hypervisor.pagetokens import PageTokens
from hypervisor.pools import Client, Pool
from hypervisor.pressure import Pressure
from hypervisor.provenance import pages_of
from hypervisor.residents import Answer
from hypervisor.tokens import Tokens
from ipc.abi import REPLY, CallFlag, Op, Priority, Status
from ipc.limits import WINDOW_SLOTS
from ipc.window import Window
from tests.support import longrun
from tests.support.expectations import GUESTS, INDEX_LAST, PARTS, Entry, Mismatch
from tests.support.oracle import World

SEEDS = 12
STEPS = 1600


@pytest.mark.parametrize("number", range(SEEDS))
def test_no_page_is_wrong_stale_foreign_or_lost(number: int) -> None:
    """Other worlds each time; a failure prints the seed that makes this one."""
    seed = random.SystemRandom().randrange(1 << 30) // SEEDS * SEEDS + number

    failure = longrun.run(seed, STEPS)

    if failure is not None:
        print("\n".join(failure.log))
        message = f"make model SEED={seed} STEPS={failure.step + 1}"
        raise AssertionError(f"step {failure.step} of {message}") from failure.error


names = st.sampled_from(GUESTS[:3])
parts = st.sampled_from(PARTS)
oids = st.integers(0, 2)
counts = st.sampled_from((1, 1, 2, 8, 64))
indexes = st.one_of(
    st.integers(0, 3),
    st.sampled_from((60, 63, 64)),
    st.just(INDEX_LAST + 1 - 64),
    st.integers(0, 200),
)
flags = st.sampled_from((0, 0, CallFlag.LOW, CallFlag.HIGH, CallFlag.ACTIVE))


class Histories(RuleBasedStateMachine):
    """What may happen; arguments are Hypothesis's choice, page contents follow from the seed."""

    world: World

    @initialize(
        seed=st.integers(0, 1000),
        policy=st.sampled_from(POLICIES),
        mode=st.sampled_from(MODES),
        groups=st.lists(st.sampled_from(("", "red")), min_size=3, max_size=3),
        compress=st.booleans(),
        lends=st.booleans(),
    )
    def begin(
        self, seed: int, policy: str, mode: str, groups: list[str], compress: bool, lends: bool
    ) -> None:
        self.world = World(seed, policy, mode, lends=lends)
        for name, group in zip(GUESTS, groups, strict=False):
            self.world.ask(verb="set", guest=name, group=group, compress=compress)

    @rule(
        name=names,
        part=parts,
        oid=oids,
        index=indexes,
        count=counts,
        flags=flags,
        token=st.integers(0, 3),
    )
    def put(
        self, name: str, part: int, oid: int, index: int, count: int, flags: int, token: int
    ) -> None:
        if (name, part) in self.world.ids:
            pages = [self.world.page() for _ in range(count)]
            self.world.put(name, part, oid, index, pages, WINDOW_SLOTS - count, flags, token)

    @rule(name=names, part=parts, oid=oids, index=indexes, count=counts, keep=st.booleans())
    def get(self, name: str, part: int, oid: int, index: int, count: int, keep: bool) -> None:
        if (name, part) in self.world.ids:
            self.world.get(name, part, oid, index, count, 0, keep=keep)

    @rule(name=names, part=parts, oid=oids, index=indexes, count=counts, token=st.integers(0, 3))
    def flush(self, name: str, part: int, oid: int, index: int, count: int, token: int) -> None:
        if (name, part) in self.world.ids:
            self.world.flush(name, part, oid, index, count, token)

    @rule(name=names, part=parts, oid=oids, token=st.integers(0, 3))
    def flush_object(self, name: str, part: int, oid: int, token: int) -> None:
        if (name, part) in self.world.ids:
            self.world.flush_object(name, part, oid, token)

    @rule(name=names, part=parts, oid=oids, index=indexes)
    def report(self, name: str, part: int, oid: int, index: int) -> None:
        if (name, part) in self.world.ids:
            self.world.report(name, part, oid, index, WINDOW_SLOTS - 1)

    @rule(
        name=names,
        op=st.sampled_from((Op.PUT_BATCH, Op.GET_BATCH, Op.FLUSH_BATCH)),
        entries=st.lists(
            st.builds(
                Entry, parts, oids, indexes, st.integers(0, 3), st.just(0), st.integers(0, 3)
            ),
            min_size=1,
            max_size=6,
        ),
    )
    def batch(self, name: str, op: Op, entries: list[Entry]) -> None:
        self.world.batch(name, op, entries)

    @rule(name=names, part=parts, priority=st.sampled_from(Priority))
    def make_pool(self, name: str, part: int, priority: Priority) -> None:
        if (name, part) not in self.world.ids:
            self.world.make_pool(name, part, priority)

    @rule(name=names, frames=st.one_of(st.integers(0, 80), st.just(2000)))
    def lend(self, name: str, frames: int) -> None:
        self.world.lend(name, frames)

    @rule(name=names, part=parts)
    def leave(self, name: str, part: int) -> None:
        if (name, part) in self.world.ids:
            self.world.leave(name, part)

    @rule(name=names)
    def depart(self, name: str) -> None:
        self.world.depart(name)

    @rule(pages=st.integers(1, 100))
    def reap(self, pages: int) -> None:
        self.world.reap(pages)

    @rule(moves=st.integers(1, 40), age_puts=st.integers(0, 3))
    def idle(self, moves: int, age_puts: int) -> None:
        self.world.idle(moves, age_puts)

    @rule()
    def restart(self) -> None:
        self.world.start()

    @rule(name=names, part=parts)
    def administer(self, name: str, part: int) -> None:
        if (name, part) in self.world.ids:
            self.world.administer(name, part)

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def holds(self) -> None:
        check(self.world.machine)


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_all_outcomes_are_met() -> None:
    """A world that never gets anywhere would prove nothing."""
    answers: set[str] = set()
    requests = taken_back = lent = 0
    for seed in range(10):
        world = longrun.world_of(seed)
        _steps(world, 1000)
        lent += sum(world.ram.lent.values())
        answers |= world.answers().keys()
        requests += world.wishes.requests
        taken_back += world.wishes.taken_back

    assert requests
    assert taken_back
    assert lent
    for outcome in (
        "PUT_PAGE DONE NONE",
        "PUT_PAGE EFROZEN FROZEN",
        "PUT_PAGE ENOMEM OVER_ALLOTMENT",
        "PUT_PAGE ENOSPC DUPLICATE_FLUSHED",
        "PUT_PAGE EPERM NOT_WRITER",
        "PUT_PAGE ESTALE STALE_TOKEN",
        "GET_PAGE DONE NONE",
        "GET_PAGE MISS NONE",
        "GET_PAGE EEMPTY POOL_EMPTY",
        "FLUSH_PAGE DONE NONE",
        "FLUSH_OBJECT DONE NONE",
        "PUT_BATCH DONE NONE",
        "GET_BATCH MISS NONE",
        "LEND DONE NONE",
        "REPORT DONE NONE",
        "REPORT MISS NONE",
        "REPORT EPERM SHARED_DENIED",
    ):
        assert outcome in answers


def _wrong_map(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Machine.execute

    def wrong(self: Machine, *arguments: object) -> bytes:
        fields = REPLY.unpack(right(self, *arguments))  # type: ignore[arg-type]
        return REPLY.pack(*fields[:5], fields[5] & ~1, fields[6])

    monkeypatch.setattr(Machine, "execute", wrong)


def _old_copy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A get that finds a page in the slot where the one before lay."""
    right = hypervisor.store.Store.get_one

    def wrong(self: hypervisor.store.Store, *arguments: object, **keywords: object) -> int:
        window, slot = arguments[3:5]
        before = bytes(window.slot(slot))  # type: ignore[attr-defined]
        found = right(self, *arguments, **keywords)  # type: ignore[arg-type]
        if found and self.sequence % 5 == 0:
            window.slot(slot)[:] = before  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(hypervisor.store.Store, "get_one", wrong)


def _flush_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushes of more than eight pages leave the last one."""
    right = hypervisor.store.Store.flush

    def wrong(self: hypervisor.store.Store, member: object, oid: bytes, index: int, n: int) -> int:
        return right(self, member, oid, index, n if n < 9 else n - 1)  # type: ignore[arg-type]

    monkeypatch.setattr(hypervisor.store.Store, "flush", wrong)


def _old_tokens_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object forgets the token of a flush."""
    monkeypatch.setattr(Tokens, "see", lambda *_: None)


def _somebody_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was first in the pool, not who put the page."""
    right = pages_of

    def wrong(machine: Machine, pools: list[Pool], oid: bytes, index: int) -> list[dict[str, Any]]:
        return [
            page | {"guest": pools[0].members[min(pools[0].members)].origin[0]}
            for page in right(machine, pools, oid, index)
        ]

    monkeypatch.setattr("hypervisor.provenance.pages_of", wrong)


def _codes_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is taken to have the token of the put that made its object."""
    monkeypatch.setattr(PageTokens, "note", lambda *_: None)


def _a_report_has_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page goes that somebody says is wrong."""
    right = Machine._report

    def wrong(
        self: Machine,
        client: Client,
        account: OpCount,
        pool_id: int,
        oid: bytes,
        index: int,
        window: Window,
        slot: int,
    ) -> Answer:
        answer = right(self, client, account, pool_id, oid, index, window, slot)
        if answer[0] == Status.DONE:
            self.store.flush(client.members[pool_id], oid, index, 1)
        return answer

    monkeypatch.setattr(Machine, "_report", wrong)


def _restart_forgets_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The segment never hears of one."""
    monkeypatch.setattr(Arena, "set_pool_token", lambda *_: None)


def _the_least_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not whoever is furthest over its allotment."""

    def wrong(self: Pressure, client: Client) -> None:
        over = [
            one
            for one in self._clients.values()
            if one.over_bytes > max(client.over_bytes, 0) and one.private_persistent()[0]
        ]
        if over:
            least = min(over, key=lambda one: one.over_bytes)
            self._ask(least, least.over_bytes, self._clock_ns())

    monkeypatch.setattr(Pressure, "refused", wrong)


def _asked_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hypervisor forgets that it has asked."""
    monkeypatch.setattr("hypervisor.pressure.ASK_AGAIN_NS", 0)


def _the_deaf_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does nothing of what it is asked for is asked again and again."""
    monkeypatch.setattr("hypervisor.pressure.Wishes.gone_by", lambda *_: 0)


def _flushes_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of flushed objects are not seen as taken back."""
    right = Pressure.flushed
    monkeypatch.setattr(
        Pressure, "flushed", lambda self, client, pages: right(self, client, min(pages, 1))
    )


def _a_lent_frame_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fifth, by a hypervisor that starts again."""
    right = Loans.adopt

    def wrong(self: Loans, client: Client, frame: int) -> None:
        if frame % 5:
            right(self, client, frame)

    monkeypatch.setattr(Loans, "adopt", wrong)


def _ram_is_lent_to_the_last_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever guests have reserved."""
    monkeypatch.setattr(
        Lending,
        "lendable",
        property(lambda self: self._store.frames.count - self._store.loans.lent),
    )


def _ram_takes_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only frames that are free are lent."""
    right = Lending.resize

    def wrong(self: Lending, client: Client, wanted: int) -> bool:
        monkeypatch.setattr(self._store, "make_room", lambda *_: None)
        try:
            return right(self, client, wanted)
        finally:
            monkeypatch.undo()
            monkeypatch.setattr(Lending, "resize", wrong)

    monkeypatch.setattr(Lending, "resize", wrong)


def _steps(world: World, count: int) -> None:
    for _ in range(count):
        world.step()


@pytest.mark.parametrize(
    "break_it",
    [
        _wrong_map,
        _old_copy_stays,
        _flush_forgets,
        _old_tokens_will_do,
        _restart_forgets_tokens,
        _somebody_else_is_named,
        _codes_are_not_kept,
        _a_report_has_an_effect,
        _the_least_is_asked,
        _asked_in_vain,
        _the_deaf_come_first,
        _flushes_do_not_count,
        _a_lent_frame_is_forgotten,
        _ram_is_lent_to_the_last_frame,
        _ram_takes_no_pages,
    ],
)
def test_the_oracle_notices(break_it: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults, each found within some hundred or thousand steps of this world."""
    world = World(21, lends=True)
    break_it(monkeypatch)  # type: ignore[operator]

    with pytest.raises(Mismatch):
        _steps(world, 5000)
