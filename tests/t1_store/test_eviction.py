"""Eviction: one conformance suite for every policy, each against a plain model, then what each is
for; and the lists and ghosts that they are made of."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.eviction import POLICIES, EvictionPolicy, Links, make_policy
from hypervisor.eviction.clock import SPARED_MAX
from hypervisor.eviction.ghosts import FORGET_MAX, Ghosts
from hypervisor.eviction.hinted import Hinted
from hypervisor.eviction.links import BLOCK_NUMBERS
from hypervisor.eviction.s3fifo import S3Fifo
from hypervisor.frames import RUN_MAX
from ipc.abi import CallFlag
from ipc.errors import InvariantError, OperatorError
from tests.t1_store.eviction_models import MODELS, Model, ModelGhosts, Page

LEAVES = 6
LEAF_PAGES = 16
NUMBERS = LEAVES * LEAF_PAGES
HINTS = (0, 0, 0, CallFlag.LOW, CallFlag.HIGH, CallFlag.ACTIVE, CallFlag.HIGH | CallFlag.ACTIVE)


class Pair:
    """A policy and its model, told the same, as a store would tell them: by runs of neighbours."""

    def __init__(self, policy: str, *, admission: bool = True) -> None:
        self.links = Links(NUMBERS // 2)
        while len(self.links.marks) <= NUMBERS:
            self.links.new_block()  # half of the numbers are entries
        self.policy = make_policy(policy, self.links, admission=admission)
        self.model: Model = MODELS[policy](admission)
        self.number: dict[Page, int] = {}
        self.page: dict[int, Page] = {}
        self.model.are_neighbours = lambda one, other: self.number[other] == self.number[one] + 1

    def runs(self, pages: list[Page]) -> list[list[Page]]:
        """Cut into runs that are neighbours in number and in one leaf."""
        runs: list[list[Page]] = []
        for page in pages:
            if runs:
                key, place = runs[-1][-1]
                if page == (key, place + 1) and (
                    self.number[page] == self.number[runs[-1][-1]] + 1
                ):
                    runs[-1].append(page)
                    continue
            runs.append([page])
        return runs

    def insert(self, pages: list[Page], start: int, hints: int) -> None:
        """Pages of one leaf that are not there get the next free numbers."""
        free = [n for n in range(NUMBERS) if n not in self.page]
        free = [*free[start % len(free) :], *free[: start % len(free)]] if free else []
        for page, number in zip(pages, free, strict=False):
            self.number[page] = number
            self.page[number] = page
        for run in self.runs([page for page in pages if page in self.number]):
            self.policy.inserted(self.number[run[0]], len(run), *run[0], hints)
            self.model.inserted(run, hints)

    def use(self, pages: list[Page]) -> None:
        for run in self.runs(pages):
            self.policy.used(self.number[run[0]], len(run))
            self.model.used(run)

    def go(self, pages: list[Page], how: str) -> None:
        for run in self.runs(pages):
            first = self.number[run[0]]
            if how == "take":
                self.policy.taken(first, len(run), *run[0])
                self.model.taken(run)
            elif how == "evict":
                self.policy.evicted(first, len(run), *run[0])
                self.model.evicted(run)
            else:
                self.policy.removed(first, len(run))
                self.model.removed(run)
            for page in run:
                del self.page[self.number.pop(page)]

    def victims(self, count: int) -> list[Page]:
        runs = self.policy.victims(count)
        assert all(1 <= length <= RUN_MAX for _, length in runs)
        return [self.page[first + at] for first, length in runs for at in range(length)]

    def check(self) -> None:
        self.policy.check(set(self.page))
        assert self.policy.pages == len(self.page)
        assert sorted(self.model.listed()) == sorted(self.number)
        assert (self.policy.front() in self.page) == bool(self.page)


class Filled:
    """A policy whose pages, each a leaf of its own, came in order."""

    def __init__(self, policy: str, count: int, *, capacity: int = 0) -> None:
        self.links = Links(2 * count)
        self.policy: EvictionPolicy = make_policy(policy, self.links)
        self.policy.capacity_pages = capacity
        self.held: set[int] = set()
        for number in range(count):
            self.insert(number)

    def insert(self, number: int, hints: int = 0) -> None:
        self.policy.inserted(number, 1, number, 0, hints)
        self.held.add(number)

    def evict(self, count: int) -> list[int]:
        """Evict until `count` are out or nothing is left; the pages in order."""
        out: list[int] = []
        while len(out) < count:
            runs = self.policy.victims(count - len(out))
            if not runs:
                break
            for first, length in runs:
                for number in range(first, first + length):
                    self.policy.evicted(number, 1, number, 0)
                    out.append(number)
        self.held -= set(out)
        self.policy.check(self.held)
        return out


@pytest.fixture(params=list(POLICIES))
def policy(request: pytest.FixtureRequest) -> str:
    """Every policy by its name."""
    return str(request.param)


# --- every policy


@pytest.mark.parametrize("admission", [True, False])
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_policy_does_what_its_model_does(
    policy: str, admission: bool, data: st.DataObject
) -> None:
    """Any calls in any order, for runs and single pages: the same pages go, in the same order."""
    pair = Pair(policy, admission=admission)
    rng = random.Random(data.draw(st.integers(0, 1 << 32), label="seed"))
    pair.policy.capacity_pages = pair.model.capacity_pages = rng.choice([0, 20, 60])
    for step in data.draw(st.lists(st.integers(0, 9), min_size=20, max_size=120), label="steps"):
        key, place = rng.randrange(LEAVES), rng.randrange(LEAF_PAGES)
        end = rng.randint(place + 1, LEAF_PAGES)
        pages = [(key, at) for at in range(place, end)]
        there = [page for page in pages if page in pair.number]
        if step <= 3:
            missing = [page for page in pages if page not in pair.number]
            pair.insert(missing, rng.randrange(NUMBERS), rng.choice(HINTS))
        elif step == 4:
            pair.use(there)
        elif step == 5:
            pair.go(there, "take")
        elif step == 6:
            pair.go(there, "remove")
        elif step <= 8:
            count = rng.randint(1, 40)
            named = pair.victims(count)
            assert named == pair.model.victims(count)
            assert len(named) == min(count, len(pair.page))
            kept = rng.randrange(len(named) + 1) if rng.random() < 0.3 else len(named)
            pair.go(named[:kept], "evict")
        else:
            pair.policy.capacity_pages = pair.model.capacity_pages = rng.choice([0, 20, 60])
        pair.check()


def test_every_page_is_named_once(policy: str) -> None:
    """Asked often enough, a policy names all pages and none twice."""
    filled = Filled(policy, 200)

    assert sorted(filled.evict(1000)) == list(range(200))
    assert filled.policy.victims(1) == []
    assert filled.policy.front() == -1


def test_pages_that_came_first_go_first(policy: str) -> None:
    """Untouched pages leave in the order in which they came, under all policies."""
    filled = Filled(policy, 64)

    assert filled.policy.front() == 0
    assert filled.evict(20) == list(range(20))


def test_a_page_that_is_named_stays_until_it_goes(policy: str) -> None:
    """Victims are named again as long as nobody evicts them."""
    filled = Filled(policy, 100)

    assert filled.policy.victims(30) == filled.policy.victims(30)
    assert filled.policy.pages == 100


def test_extents_go_as_extents(policy: str) -> None:
    """What came by the run is named by the run, cut where more was asked for than is needed."""
    links = Links(200)
    made = make_policy(policy, links)
    for at, first in enumerate((128, 0, 64)):
        made.inserted(first, 32, at, 0, 0)

    assert made.victims(80) == [(128, 32), (0, 32), (64, 16)]


def test_two_members_share_the_arrays_and_nothing_else(policy: str) -> None:
    """Pages of one instance are never named by another, and a closed one's lists are used again."""
    links = Links(100)
    one, other = make_policy(policy, links), make_policy(policy, links)
    numbers = len(links.marks)
    one.inserted(0, 10, 1, 0, 0)
    other.inserted(10, 10, 1, 10, 0)

    assert one.victims(100) == [(0, 10)]
    assert other.victims(100) == [(10, 10)]
    other.removed(10, 10)
    other.close()
    for _ in range(BLOCK_NUMBERS):
        make_policy(policy, links).close()
    assert len(links.marks) == numbers
    one.check(set(range(10)))


def test_check_sees_a_page_that_is_missing_or_too_many(policy: str) -> None:
    """Both ways to differ are found."""
    filled = Filled(policy, 10)

    filled.policy.check(set(range(10)))
    with pytest.raises(InvariantError):
        filled.policy.check(set(range(11)))
    with pytest.raises(InvariantError):
        filled.policy.check(set(range(9)))


def test_a_search_among_pages_that_all_were_used_is_bounded(policy: str) -> None:
    """It moves at most SPARED_MAX pages and those of one run, and still names as many as asked."""
    pages = 3 * SPARED_MAX
    links = Links(pages)
    made = make_policy(policy, links)
    for first in range(0, pages, 64):
        made.inserted(first, 64, first, 0, 0)
    for _ in range(3):
        for first in range(0, pages, 64):
            made.used(first, 64)
    before = bytes(links.marks)

    assert sum(length for _, length in made.victims(10)) == 10
    moved = sum(one != other for one, other in zip(before, links.marks, strict=True))
    assert moved <= SPARED_MAX + RUN_MAX
    made.check(set(range(pages)))


def test_an_unknown_policy_is_refused_with_the_choice() -> None:
    """The message names what there is."""
    with pytest.raises(OperatorError, match="fifo, clock, s3fifo, hinted"):
        make_policy("lru", Links(64))


# --- each of them


def test_fifo_forgets_that_a_page_was_used() -> None:
    """Only when a page came counts."""
    filled = Filled("fifo", 64)
    filled.policy.used(0, 1)

    assert filled.evict(1) == [0]


def test_clock_spares_a_page_that_was_used_once() -> None:
    """It goes to the end of the line, unmarked."""
    filled = Filled("clock", 10)
    filled.policy.used(0, 1)

    assert filled.evict(20) == [*range(1, 10), 0]


def test_s3fifo_promotes_a_page_that_was_used_twice() -> None:
    """One use in the small queue is not enough, as in the reference."""
    filled = Filled("s3fifo", 10)
    filled.policy.used(0, 1)
    filled.policy.used(1, 1)
    filled.policy.used(1, 1)

    assert filled.evict(20) == [0, *range(2, 10), 1]


@pytest.mark.parametrize("name", ["s3fifo", "hinted"])
@pytest.mark.parametrize("how", ["evicted", "taken"])
def test_a_page_that_comes_again_comes_into_the_main_queue(name: str, how: str) -> None:
    """Whether it was evicted on probation or taken by a get; a flushed one is a new one."""
    filled = Filled(name, 20, capacity=20)
    filled.evict(1)
    for number in (1, 2):
        filled.held.remove(number)
    if how == "taken":
        filled.policy.taken(1, 1, 1, 0)
    else:
        filled.policy.evicted(1, 1, 1, 0)
    filled.policy.removed(2, 1)
    filled.insert(2)
    filled.insert(1)

    assert filled.evict(20)[-1] == 1
    assert filled.held == set()


def test_a_page_comes_again_as_part_of_an_extent() -> None:
    """Each page of a put is looked up by its place; known ones and new ones part ways."""
    links = Links(200)
    made = make_policy("s3fifo", links)
    made.inserted(0, 32, 7, 0, 0)
    made.evicted(4, 4, 7, 4)
    made.evicted(20, 2, 7, 20)
    made.removed(0, 4)
    made.removed(8, 12)
    made.removed(22, 10)
    made.inserted(100, 32, 7, 0, 0)

    named = made.victims(32)

    assert named == [(100, 4), (108, 12), (122, 10), (104, 4), (120, 2)]


def test_hinted_listens_to_the_hints() -> None:
    """Low first, then probation, then what is active or valuable; the valuable is spared once."""
    filled = Filled("hinted", 10)
    hints = (0, CallFlag.HIGH, CallFlag.ACTIVE, CallFlag.LOW, CallFlag.LOW | CallFlag.ACTIVE)
    for number, hint in enumerate(hints, 10):
        filled.insert(number, hint)

    assert filled.policy.front() == 13
    assert filled.evict(20) == [13, 14, *range(10), 10, 12, 11]


def test_hinted_lengthens_probation_while_pages_come_back_from_it() -> None:
    """A loop over a third more than fits: what was evicted on probation comes back at once."""
    filled = Filled("hinted", 90, capacity=90)
    for number in range(90, 120):
        filled.evict(1)
        filled.insert(number)
    marks = filled.links.marks

    def waiting() -> int:
        return sum(marks[number] < 4 for number in filled.held)

    first = waiting()
    for _ in range(10):
        for number in range(120):
            if number not in filled.held:
                filled.evict(1)
                filled.insert(number)
    assert first < waiting()


@pytest.mark.parametrize("name", ["s3fifo", "hinted"])
def test_without_admission_there_is_no_probation(name: str) -> None:
    """Every page waits in the same line, whatever is known of it, and keys are not needed."""
    links = Links(100)
    made = make_policy(name, links, admission=False)
    made.inserted(0, 10, 0, 0, 0)
    made.taken(0, 5, 0, 0)
    made.inserted(20, 5, 0, 0, 0)
    made.inserted(0, 5, 0, 0, 0)

    assert not made.wants_keys
    assert made.victims(20) == [(5, 5), (20, 5), (0, 5)]


@pytest.mark.parametrize("name", ["s3fifo", "hinted"])
def test_what_is_remembered_is_bounded(name: str) -> None:
    """By pages, and what the reference does not remember by leaves too: those cost memory."""
    filled = Filled(name, 100, capacity=100)
    policy = filled.policy
    assert isinstance(policy, S3Fifo)
    for key in range(1000, 3000):
        policy.taken(0, 1, key, 0)
        policy.inserted(0, 1, key + 5000, 0, 0)
    for key in range(10_000, 12_000):
        (first, _) = policy.victims(1)[0]
        policy.evicted(first, 1, key, 0)
        policy.inserted(first, 1, key + 5000, 0, CallFlag.ACTIVE if key % 2 else 0)

    assert policy._taken.leaves in (49, 50, 51)
    assert policy._ghosts.leaves in (90, 91)
    if isinstance(policy, Hinted):
        assert policy._main_ghosts.leaves in (50, 51)


# --- what they are made of


def test_a_list_is_appended_to_and_cut_anywhere() -> None:
    """Runs merge and part; numbers in no list are touched by nothing."""
    links = Links(1000)
    line, other = links.new_list(), links.new_list()
    links.append(line, 10, 5, 1)
    links.append(line, 15, 5, 2)
    links.append(other, 0, 10, 3)

    assert links.front_run(line, 64) == (10, 10)
    links.remove(12, 2)
    assert list(links.walk(line)) == [10, 11, *range(14, 20)]
    assert links.front_run(line, 64) == (10, 2)
    links.append(line, 12, 2, 0)
    links.remove(11, 8)
    assert list(links.walk(line)) == [10, 19]
    assert list(links.walk(other)) == list(range(10))
    assert links.front_run(links.new_list(), 64) is None
    assert bytes(links.marks[10:20]) == b"\1\1\0\0\1\2\2\2\2\2"


@pytest.mark.parametrize("step", [2, 255, 256, 257, 512, 65536, 65792])
def test_a_run_ends_where_the_step_looks_like_ones(step: int) -> None:
    """Steps that are made of the same bytes as runs of one are no runs."""
    links = Links(70_000)
    line = links.new_list()
    links.append(line, 0, 3, 0)
    links.append(line, 2 + step, 3, 0)
    links.append(line, 69_000, 2, 0)

    assert links.run_length(0, 64) == 3
    assert links.run_length(2 + step, 64) == 3
    assert links.run_length(0, 2) == 2
    assert links.run_length(69_001, 64) == 1


def test_a_run_does_not_reach_into_a_sentinel() -> None:
    """Entries end where a block of sentinels may begin."""
    links = Links(0)
    first = links.new_block()
    line = links.new_list()
    links.append(line, first + BLOCK_NUMBERS - 3, 3, 0)

    assert links.front_run(line, 64) == (first + BLOCK_NUMBERS - 3, 3)
    assert list(links.walk(line)) == list(range(first + BLOCK_NUMBERS - 3, first + BLOCK_NUMBERS))


def test_a_page_keeps_its_place_under_another_number() -> None:
    """Also alone in its list, and next to the number that it gets."""
    links = Links(100)
    line = links.new_list()
    links.append(line, 10, 3, 5)
    links.replace(11, 50)
    links.replace(10, 11)
    assert list(links.walk(line)) == [11, 50, 12]
    assert links.marks[50] == 5
    links.remove(11, 2)
    links.replace(50, 0)
    assert list(links.walk(line)) == [0]


def test_a_broken_ring_is_found() -> None:
    """A step that does not lead back, and a ring that never comes to its sentinel."""
    links = Links(100)
    line = links.new_list()
    links.append(line, 0, 3, 0)
    links.following[1] = 5
    with pytest.raises(InvariantError, match="not behind"):
        list(links.walk(line))
    links.following[1], links.previous[0], links.following[2], links.previous[0] = 1, -2, -2, 2
    links.following[line], links.previous[2] = -line, -1
    with pytest.raises(InvariantError):
        list(links.walk(line))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 60)), max_size=80))
def test_ghosts_are_remembered_as_in_the_model(steps: list[tuple[int, int, int]]) -> None:
    """Additions, takings and limits in any order."""
    ghosts, model = Ghosts(), ModelGhosts()
    for at, (what, key, place) in enumerate(steps):
        count = 1 + (at * 7 + place) % min(5, 64 - place)
        pages = [(key, place + offset) for offset in range(count)]
        if what <= 1:
            ghosts.add(key, place, count)
            model.add(pages)
        elif what == 2:
            bitmap = sum(1 << page[1] - place for page in model.take(pages))
            assert ghosts.take(key, place, count) == bitmap
        else:
            ghosts.trim(place, key)
            model.trim(place, key)
        ghosts.check()
        assert ghosts.pages == model.pages


def test_a_limit_that_falls_far_is_reached_step_by_step() -> None:
    """One call forgets a bounded number of leaves, the oldest first."""
    ghosts = Ghosts()
    for key in range(2 * FORGET_MAX):
        ghosts.add(key, 0, 1)

    sizes = [ghosts.pages]
    while ghosts.pages:
        ghosts.trim(0)
        sizes.append(ghosts.pages)
    assert [one - other for one, other in pairwise(sizes)] == [FORGET_MAX, FORGET_MAX]
