"""The checker of histories: what it finds, and what it must let pass."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from tools.histories import INITIAL, Call, Register, check, read_history

PAGE = Register("/a", 0)


def write(value: str, begin: int, end: int, node: str = "alpha") -> Call:
    """A write of alpha's."""
    return Call(node, "write", PAGE, value, begin, end)


def read(value: str, begin: int, end: int, node: str = "bravo") -> Call:
    """A read of bravo's."""
    return Call(node, "read", PAGE, value, begin, end)


def sync(value: str, begin: int, end: int, node: str = "alpha") -> Call:
    """An fsync of alpha's."""
    return Call(node, "sync", PAGE, value, begin, end)


@pytest.mark.parametrize(
    "calls",
    [
        [read(INITIAL, 0, 1), write("1", 2, 3), read("1", 4, 5)],
        [write("1", 0, 10), read(INITIAL, 1, 2), read("1", 3, 4)],
        [write("1", 0, 10), write("2", 0, 10, "bravo"), read("2", 11, 12), read("2", 13, 14)],
        [write("1", 0, 1), write("2", 2, 9), read("1", 3, 4), read("2", 5, 6)],
    ],
)
def test_coherent_histories_pass(calls: list[Call]) -> None:
    """Each of these has an order."""
    assert check(calls) == []


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        ([write("1", 0, 1), read(INITIAL, 2, 3)], "bravo read 0.0 of the beginning"),
        ([write("1", 0, 1), write("2", 2, 3), read("1", 4, 5)], "had written 2"),
        ([read("1", 0, 1), write("1", 2, 3)], "before it was written"),
        ([read("9", 0, 1)], "which nobody wrote"),
        # Each read overlaps the write, but the second one goes back in time.
        ([write("1", 0, 10), read("1", 1, 2), read(INITIAL, 3, 4)], "came while"),
        (
            [
                write("1", 0, 9),
                write("2", 0, 9, "carol"),
                read("1", 10, 11),
                read("2", 12, 13),
                read("1", 14, 15),
            ],
            "same time|came while",
        ),
    ],
)
def test_incoherent_histories_are_found(calls: list[Call], text: str) -> None:
    """None of these has one, and the text says what a person can check."""
    violations = check(calls)
    assert violations
    assert any(part in violations[0].text for part in text.split("|"))
    assert violations[0].register == PAGE


def test_what_a_lost_node_did_not_sync_may_be_gone() -> None:
    """Not even its own reads of it count."""
    lost = [write("1", 0, 1), read("1", 2, 3, "alpha"), read(INITIAL, 4, 5)]
    assert check(lost)
    assert check(lost, frozenset({"alpha"})) == []


def test_what_a_lost_node_synced_may_not_be_gone() -> None:
    """An fsync is a promise."""
    calls = [write("1", 0, 1), sync("1", 1, 2), read(INITIAL, 4, 5)]
    assert check(calls, frozenset({"alpha"}))


def test_what_another_node_has_seen_may_not_be_gone() -> None:
    """It was on the disk before the other could see it."""
    calls = [write("1", 0, 1), read("1", 2, 3, "carol"), read(INITIAL, 4, 5)]
    assert check(calls, frozenset({"alpha"}))


def test_a_lost_node_may_not_read_old_pages() -> None:
    """Whoever wakes up fenced must not serve what it had cached."""
    calls = [write("1", 0, 1, "bravo"), read(INITIAL, 4, 5, "alpha")]
    assert check(calls, frozenset({"alpha"}))


def linearizable(calls: list[Call]) -> bool:
    """By trying every order."""
    for order in itertools.permutations(calls):
        value = INITIAL
        for at, call in enumerate(order):
            if any(later.end_ns < call.begin_ns for later in order[at + 1 :]):
                break
            if call.kind == "write":
                value = call.value
            elif call.value != value:
                break
        else:
            return True
    return False


def test_the_verdict_is_that_of_trying_every_order() -> None:
    """Zones against brute force, on small random histories."""
    seed = random.randrange(2**32)
    choose = random.Random(seed)
    verdicts = []
    for _ in range(400):
        moments = choose.sample(range(40), 10)
        spans = [sorted(moments[at : at + 2]) for at in range(0, 10, 2)]
        values = ["1", "2", *(choose.choice([INITIAL, "1", "2"]) for _ in range(3))]
        kinds = ["write", "write", "read", "read", "read"]
        nodes = ["alpha", "bravo", "carol", "carol", "carol"]
        calls = [
            Call(node, kind, PAGE, value, *span)
            for node, kind, value, span in zip(nodes, kinds, values, spans, strict=True)
        ]
        expected = linearizable(calls)
        verdicts.append(expected)
        assert (check(calls) == []) == expected, f"seed {seed}: {calls}"
    assert {True, False} == set(verdicts), f"seed {seed}"


def test_a_record_that_was_cut_off_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    """A killed guest leaves half a line and a call without an end."""
    lines = [
        {"at": "begin", "call": "write", "path": "/a", "page": 0, "value": "1", "ns": 5},
        {"at": "end", "call": "write", "path": "/a", "page": 0, "value": "1", "ns": 6},
        {"at": "begin", "call": "read", "path": "/a", "page": 0, "value": "", "ns": 7},
        {"at": "end", "call": "read", "path": "/a", "page": 0, "value": "1", "ns": 9},
        {"at": "begin", "call": "write", "path": "/a", "page": 0, "value": "2", "ns": 10},
    ]
    path = tmp_path / "alpha.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"at": "en')
    calls = read_history("alpha", path)
    assert calls[:2] == [write("1", 5, 6), read("1", 7, 9, "alpha")]
    assert [call.returned for call in calls] == [True, True, False]
    assert check(calls) == []
