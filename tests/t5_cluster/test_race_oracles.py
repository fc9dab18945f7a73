"""The judges of races find what they are for, in records that say what must not be."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from tests.t5_cluster.race_oracles import judge
from tests.t5_cluster.races import GUESTS, Call, Outcome, Seen
from tests.t5_cluster.test_shared_values import Story, Use
from tests.t5_cluster.test_shared_values import judge as judge_values

FOLDER = "/r"
DIRECTORIES = ("a", "b", "a/box", "b/deep", "crowns")


class Record:
    """Calls one after the other, and the tree that they leave."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.tree: dict[str, Seen] = {}
        self._times = itertools.count(1)

    def call(self, who: str, name: str, path: str, error: str | None = None, **facts: Any) -> Call:
        """One call that came back."""
        begin_ns, end_ns = next(self._times), next(self._times)
        call = Call(who, name, f"{FOLDER}/{path}", begin_ns, end_ns, error, facts)
        self.calls.append(call)
        return call

    def see(
        self, kind: str, path: str, value: Any = None, *, size: int = 0, links: int = 1
    ) -> None:
        """A name in the end."""
        self.tree[f"{FOLDER}/{path}"] = Seen(kind, size, links, value)

    def judge(self, kind: str, *lost: str) -> list[str]:
        """What the judge says when all nodes see the same."""
        trees = {guest: dict(self.tree) for guest in GUESTS}
        return judge(kind, Outcome(self.calls, [], trees, frozenset(lost)), FOLDER)


@pytest.fixture
def record() -> Record:
    """Of nothing so far."""
    return Record()


def test_nodes_that_see_different_trees(record: Record) -> None:
    """All look when nobody changes anything."""
    record.call("red", "create", "red.0")
    record.see("file", "red.0")
    outcome = Outcome(record.calls, ["torn"], {"red": record.tree, "blue": {}})
    complaints = judge("cross", outcome, FOLDER)
    assert complaints[0] == "torn"
    assert "blue sees another" in complaints[1]


def test_file_that_is_removed_twice_or_gone_by_itself(record: Record) -> None:
    """Each that was made is taken once, or there."""
    record.call("red", "create", "red.0")
    assert "made by red, taken by nobody" in "".join(record.judge("cross"))
    record.call("blue", "unlink", "red.0")
    assert record.judge("cross") == []
    record.call("green", "unlink", "red.0")
    assert "taken by blue, green" in "".join(record.judge("cross"))
    assert record.judge("cross", "blue") == [], "what a dead node did may be undone, and done again"


def test_name_with_two_winners(record: Record) -> None:
    """And one with none, and one that is not what its winner made."""
    record.call("red", "mkdir", "any.0")
    record.see("dir", "any.0")
    assert record.judge("create") == []
    record.call("blue", "symlink", "any.0")
    assert "was made by red, blue" in "".join(record.judge("create"))
    assert record.judge("create", "blue") == []
    assert "any.0 is" in "".join(record.judge("create", "red")), "of blue it would be a link"
    del record.tree[f"{FOLDER}/any.0"]
    assert "is gone" in "".join(record.judge("create"))
    record.see("dir", "other")
    assert "made by nobody" in "".join(record.judge("create"))


def test_links_that_are_miscounted(record: Record) -> None:
    """A source has as many names as links to it have won."""
    record.call("red", "create", "source.red")
    record.call("red", "link", "link.0")
    record.see("file", "link.0", ["red", 0], size=9, links=2)
    record.see("file", "source.red", ["red", 0], size=9, links=1)
    assert "1 links and 1 further" in "".join(record.judge("create"))
    record.see("file", "source.red", ["red", 0], size=9, links=2)
    assert record.judge("create") == []


def moved(record: Record) -> None:
    """A tree in which nothing is wrong."""
    for name in DIRECTORIES:
        record.see("dir", name)
    for number in range(5):
        record.see("file", f"a/box/token.{number}", ["token", number])
    record.call("red", "mkdir", "yard")
    record.see("dir", "yard")


def test_thing_that_is_lost_doubled_or_left(record: Record) -> None:
    """What moves is there once."""
    moved(record)
    assert record.judge("directories") == []
    record.see("file", "b/token.3", ["token", 3])
    record.see("file", "a/box/token.2", ["token", 1])
    del record.tree[f"{FOLDER}/b/deep"]
    record.see("file", "crowns/red.1", ["red", 1])
    complaints = "".join(record.judge("directories"))
    for text in ("token.3 is there 2", "token.2 holds", "deep is there 0", "red.1 is left"):
        assert text in complaints


def test_yard_and_crown_that_nobody_made(record: Record) -> None:
    """They are there as often as they were made and not removed."""
    moved(record)
    del record.tree[f"{FOLDER}/yard"]
    record.call("blue", "rename", "crowns/blue.0", to=f"{FOLDER}/crowns/crown")
    complaints = "".join(record.judge("directories"))
    assert "yard: made by red, taken by nobody, there: False" in complaints
    assert "there is no crown" in complaints
    record.see("file", "crowns/crown", ["green", 0], links=2)
    complaints = "".join(record.judge("directories"))
    assert "the crown is of" in complaints
    assert "2 links" in complaints


def test_read_of_what_nobody_wrote(record: Record) -> None:
    """Or of what somebody writes later."""
    record.call("red", "write", "0", number=1)
    record.call("blue", "read", "0", value=["red", 1])
    assert record.judge("files") == []
    record.call("blue", "read", "0", value=["red", 2])
    record.call("red", "write", "0", number=2)
    record.see("file", "0", ["green", 7])
    complaints = record.judge("files")
    assert len(complaints) == 2


def logs(record: Record, *grows: list[Any]) -> None:
    """The three logs."""
    record.see("file", "grows", list(grows))
    record.see("file", "cut", [])
    record.see("file", "emptied", [])


def test_record_that_is_lost_doubled_or_too_early(record: Record) -> None:
    """The order of a log is that of the calls."""
    for who in ("red", "blue"):
        record.call(who, "append", "grows", number=0)
    logs(record, ["red", 0], ["blue", 0])
    assert record.judge("append") == []
    logs(record, ["blue", 0], ["red", 0])
    assert "stands behind a later one" in "".join(record.judge("append"))
    logs(record, ["red", 0], ["red", 0], ["green", 1])
    complaints = "".join(record.judge("append"))
    for text in ("twice", "appended by nobody", "('blue', 0) is lost"):
        assert text in complaints


def test_record_that_is_lost_in_the_middle_of_a_dead_nodes(record: Record) -> None:
    """Its last ones may be missing, but for those before its last fsync."""
    for number in range(3):
        record.call("red", "append", "grows", number=number)
    logs(record, ["red", 0])
    assert "is lost" in "".join(record.judge("append"))
    assert record.judge("append", "red") == []
    logs(record, ["red", 0], ["red", 2])
    assert "of red there is [0, 2]" in "".join(record.judge("append", "red"))
    record.call("red", "fsync", "grows")
    logs(record, ["red", 0])
    assert "('red', 2) is lost" in "".join(record.judge("append", "red"))


def test_record_after_the_last_cut_is_there(record: Record) -> None:
    """A cut takes what was there."""
    record.call("red", "append", "emptied", number=0)
    record.call("blue", "empty", "emptied")
    logs(record)
    assert record.judge("append") == []
    record.call("red", "append", "emptied", number=1)
    assert "('red', 1) is lost" in "".join(record.judge("append"))


def test_synced_file_that_is_gone_or_torn(record: Record) -> None:
    """Of a dead node only what it synced is certain."""
    record.call("red", "create", "red/red.0")
    record.call("red", "write", "red/red.0")
    assert record.judge("own", "red") == []
    record.see("file", "red/red.0")
    assert record.judge("own", "red") == []
    record.call("red", "fsync", "red/red.0")
    assert "holds None" in "".join(record.judge("own", "red"))
    record.see("file", "red/red.0", ["red", 0])
    assert record.judge("own", "red") == []
    del record.tree[f"{FOLDER}/red/red.0"]
    assert "there: False" in "".join(record.judge("own", "red"))


def test_value_that_is_old_doubled_or_lost_for_nothing() -> None:
    """Uses of a lock in EX follow each other, and each sees what the one before wrote."""
    first = Use("red", "EX", 0, 10, written=1, end_ns=20)
    second = Use("blue", "EX", 1, 30, written=2, end_ns=40)

    def complaints(*uses: Use, deaths: tuple[int, ...] = ()) -> list[str]:
        return list(judge_values([Story("all", list(uses))], list(deaths)))

    assert complaints(first, second) == []
    assert "does not see 1" in complaints(first, replace(second, value=0))[0]
    assert "begins while" in complaints(first, replace(second, begin_ns=15))[0]
    assert "nobody died" in complaints(first, replace(second, value=None))[0]
    assert complaints(first, replace(second, value=None), deaths=(25,)) == []
    died = replace(first, end_ns=None)
    assert "does not see None" in complaints(died, second, deaths=(25,))[0]
