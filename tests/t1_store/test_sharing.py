"""Shared contents: found within a domain only, and paid for exactly."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hypervisor.sharing import Charges, SharedContents, Sharing, charge, domain_of
from ipc.abi import PAGE_BYTES
from ipc.errors import InvariantError

METADATA_BYTES_MAX = 36
"""A content of one holder, in an index of any size worth speaking of."""


def page(number: int) -> bytes:
    """A page by number."""
    return number.to_bytes(8, "little") * (PAGE_BYTES // 8)


def domain(scope: Sharing, *, guest: str = "a", group: str = "x", persistent: bool = False) -> str:
    """A domain that is one."""
    found = domain_of(scope, guest=guest, group=group, persistent=persistent)
    assert found is not None
    return found


# --- domains


def test_pages_match_within_a_domain_and_never_across() -> None:
    """Guest against guest, group against group, and a group against a guest of its name."""
    contents = SharedContents(seed=1)
    domains = [
        domain(scope, guest=name, group=name, persistent=persistent)
        for scope in (Sharing.GUEST, Sharing.GROUP)
        for name in ("a", "b")
        for persistent in (False, True)
    ]
    domains += [domain(Sharing.ALL), domain(Sharing.ALL, persistent=True)]

    for number, name in enumerate(domains):
        assert contents.find(contents.digest(page(5), name)) == -1
        content = contents.insert(contents.digest(page(5), name), number)
        contents.add(content, 1, PAGE_BYTES)

    assert len(set(domains)) == 10
    assert len({contents.digest(page(5), name) >> 40 for name in domains}) == 10
    for number, name in enumerate(domains):
        assert contents.location[contents.find(contents.digest(page(5), name))] == number


def test_scopes_say_who_shares_with_whom() -> None:
    """Guests in one group share, whoever they are; with scope off nobody does."""
    assert domain_of(Sharing.OFF, guest="a", group="x", persistent=False) is None
    assert domain(Sharing.GROUP, guest="a") == domain(Sharing.GROUP, guest="b")
    assert domain(Sharing.ALL, guest="a", group="x") == domain(Sharing.ALL, guest="b", group="y")
    assert domain(Sharing.GUEST, guest="a") != domain(Sharing.GUEST, guest="b")


def test_a_retired_domain_leaves_nothing_to_the_next_of_its_name() -> None:
    """Though the contents are still there, and can still lose their references."""
    contents = SharedContents(seed=1)
    old = contents.insert(contents.digest(page(5), "guest a"), 7)
    contents.add(old, 1, PAGE_BYTES)

    contents.retire("guest a")
    contents.retire("guest unheard of")

    digest = contents.digest(page(5), "guest a")
    assert contents.find(digest) == -1
    new = contents.insert(digest, 8)
    contents.add(new, 2, PAGE_BYTES)
    contents.check({old: (7, {1: 1}), new: (8, {2: 1})})
    assert contents.drop(old, 1, PAGE_BYTES) == [(1, -PAGE_BYTES)]
    assert contents.find(digest) == new


def test_digests_depend_on_the_seed() -> None:
    """Nobody who doesn't know it can prepare pages that collide."""
    one, other = SharedContents(seed=1), SharedContents(seed=2)

    digests = {shared.digest(page(n), "d") for shared in (one, other) for n in range(100)}

    assert len(digests) == 200
    assert one.digest(page(3), "d") == SharedContents(seed=1).digest(page(3), "d")


def test_an_unmatched_digest_is_nobody_elses() -> None:
    """Recovery finds contents whose domain nobody knows any more."""
    contents = SharedContents(seed=1)
    digests = {contents.unmatched_digest() for _ in range(100)}

    for digest in digests:
        assert contents.find(digest) == -1
        contents.add(contents.insert(digest, 1), 1, PAGE_BYTES)

    assert len(digests) == contents.count == 100
    assert contents.find(contents.digest(page(1), "d")) == -1


# --- charges


def test_what_a_content_costs_is_split_by_references() -> None:
    """The example of the documentation."""
    assert [charge(4096, 3, refs) for refs in (1, 2)] == [1365, 2730]
    contents = SharedContents(seed=1)
    content = contents.insert(contents.digest(page(1), "d"), 0)

    assert contents.add(content, 7, 4096) == [(7, 4096)]
    assert contents.add(content, 7, 4096) == []
    assert contents.add(content, 8, 4096) == [(7, 2730 - 4096), (8, 1365)]
    assert contents.resize(content, 4096, 2048) == [(7, 1365 - 2730), (8, 682 - 1365)]
    assert contents.drop(content, 7, 2048) == [(7, 1024 - 1365), (8, 1024 - 682)]
    assert contents.drop(content, 7, 2048) == [(7, -1024), (8, 1024)]
    assert contents.holders(content) == {8: 1}
    assert contents.drop(content, 8, 2048) == [(8, -2048)]
    contents.check({})


def test_a_member_that_leaves_pays_nothing_any_more() -> None:
    """And the others pay everything, to the byte, but for the rounding."""
    contents = SharedContents(seed=1)
    content = contents.insert(contents.digest(page(1), "d"), 0)
    paid: Counter[int] = Counter()
    for member in range(64):
        paid.update(dict(contents.add(content, member, 4097)))
    assert set(paid.values()) == {4097 // 64}

    for member in range(63):
        paid.update(dict(contents.drop(content, member, 4097)))

    assert {member: bytes_ for member, bytes_ in paid.items() if bytes_} == {63: 4097}


# --- the index


@pytest.mark.parametrize("seed", range(5))
def test_the_index_grows_and_shrinks_by_single_buckets(seed: int) -> None:
    """Through several doublings up and down, everything is found, and only that."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    contents = SharedContents(seed)
    digests: dict[int, int] = {}
    for target in (3000, 100, 1500, 0, 70, 0):
        while len(digests) < target:
            digest = contents.digest(rng.randbytes(16), "d")
            assert contents.find(digest) == -1
            content = contents.insert(digest, len(digests))
            contents.add(content, 1, PAGE_BYTES)
            digests[digest] = content
        for digest in rng.sample(sorted(digests), len(digests) - target):
            contents.drop(digests.pop(digest), 1, PAGE_BYTES)
        assert all(contents.find(digest) == content for digest, content in digests.items())
        assert contents.count == contents.references == len(digests)
        contents.check({n: (contents.location[n], {1: 1}) for n in digests.values()})


def test_a_content_of_one_holder_takes_few_bytes() -> None:
    """Every page that is not shared pays this too, so it has to be small."""
    contents = SharedContents(seed=1)
    for number in range(20_000):
        content = contents.insert(contents.digest(number.to_bytes(8, "little"), "d"), number)
        contents.add(content, 1, PAGE_BYTES)

    assert contents.metadata_bytes / contents.count < METADATA_BYTES_MAX


def test_the_proof_finds_a_contradiction() -> None:
    """Location, holders, counts."""
    contents = SharedContents(seed=1)
    content = contents.insert(contents.digest(page(1), "d"), 9)
    contents.add(content, 1, PAGE_BYTES)
    contents.add(content, 2, PAGE_BYTES)
    contents.check({content: (9, {1: 1, 2: 1})})

    for wrong in ({}, {content: (8, {1: 1, 2: 1})}, {content: (9, {1: 2})}):
        with pytest.raises(InvariantError):
            contents.check(wrong)
    contents.refs[content] += 1
    with pytest.raises(InvariantError):
        contents.check({content: (9, {1: 1, 2: 1})})


# --- anything in any order

DOMAINS = ("guest a", "group x")
MEMBERS = 3


class SharingLife(RuleBasedStateMachine):
    """Against dictionaries; `paid` is what members were told, summed up."""

    @initialize(seed=st.integers(0, 2**64 - 1))
    def start(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.contents = SharedContents(seed)
        self.numbers: dict[tuple[str, int, int], int] = {}
        self.held: dict[int, int] = {}
        self.locations: dict[int, int] = {}
        self.refs: dict[int, Counter[int]] = {}
        self.epochs: Counter[str] = Counter()
        self.paid: Counter[int] = Counter()

    def pay(self, changes: Charges) -> None:
        assert len({member for member, _ in changes}) == len(changes)
        for member, change in changes:
            self.paid[member] += change

    @rule(
        name=st.sampled_from(DOMAINS),
        number=st.integers(0, 3),
        member=st.integers(0, MEMBERS - 1),
        held_bytes=st.sampled_from((64, 1365, 3276, 4096)),
    )
    def put(self, name: str, number: int, member: int, held_bytes: int) -> None:
        key = (name, self.epochs[name], number)
        digest = self.contents.digest(page(number), name)
        content = self.contents.find(digest)
        assert content == self.numbers.get(key, -1)
        if content < 0:
            location = self.random.getrandbits(64)
            content = self.contents.insert(digest, location)
            assert content not in self.refs
            self.numbers[key] = content
            self.locations[content] = location
            self.held[content] = held_bytes
            self.refs[content] = Counter()
        self.pay(self.contents.add(content, member, self.held[content]))
        self.refs[content][member] += 1

    @precondition(lambda self: self.refs)
    @rule(times=st.integers(1, 10))
    def drop(self, times: int) -> None:
        for _ in range(times):
            if not self.refs:
                return
            content = self.random.choice(sorted(self.refs))
            member = self.random.choice(sorted(self.refs[content]))
            self.pay(self.contents.drop(content, member, self.held[content]))
            self.refs[content] -= Counter({member: 1})
            if not self.refs[content]:
                del self.refs[content], self.held[content], self.locations[content]
                (key,) = (key for key, known in self.numbers.items() if known == content)
                del self.numbers[key]

    @precondition(lambda self: self.refs)
    @rule(held_bytes=st.integers(1, 4096))
    def move(self, held_bytes: int) -> None:
        content = self.random.choice(sorted(self.refs))
        self.locations[content] = self.random.getrandbits(64)
        self.contents.move(content, self.locations[content])
        self.pay(self.contents.resize(content, self.held[content], held_bytes))
        self.held[content] = held_bytes

    @rule(name=st.sampled_from(DOMAINS))
    def retire(self, name: str) -> None:
        self.contents.retire(name)
        self.epochs[name] += 1

    @invariant()
    def agrees(self) -> None:
        self.contents.check(
            {content: (self.locations[content], dict(refs)) for content, refs in self.refs.items()}
        )
        owed: Counter[int] = Counter()
        for content, refs in self.refs.items():
            total = sum(refs.values())
            shares = {
                member: charge(self.held[content], total, count) for member, count in refs.items()
            }
            owed.update(shares)
            assert 0 <= self.held[content] - sum(shares.values()) < len(refs)
        assert owed == self.paid


TestSharingLife = SharingLife.TestCase
TestSharingLife.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
