"""What may come out of a race, told from the joined records of all who ran it.

Each judge returns what can't be, as texts.  With killed racers (`Outcome.lost`) a call of theirs
that was not synced may have happened or not, and may have been done again by somebody else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise

from tests.t5_cluster.races import Call, Outcome, Seen


def judge(kind: str, outcome: Outcome, folder: str) -> list[str]:
    """All that is wrong with a race of one kind in a folder of its own."""
    assert any(call.path.startswith(f"{folder}/") for call in outcome.calls), "nobody raced there"
    found = list(outcome.wrong)
    first = outcome.tree
    for guest, tree in outcome.trees.items():
        found += [
            f"{guest} sees another {path}: {tree.get(path)} and not {first.get(path)}"
            for path in sorted(tree.keys() | first.keys())
            if tree.get(path) != first.get(path)
        ]
    return found + list(JUDGES[kind](outcome, folder))


def _by_path(outcome: Outcome, *names: str) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = defaultdict(list)
    for call in outcome.named(*names):
        found[call.path].append(call)
    return found


def judge_counts(
    outcome: Outcome, makes: tuple[str, ...], takes: tuple[str, ...], prefix: str
) -> Iterator[str]:
    """Each name was made once more often than it was taken, or as often and is not there."""
    made, taken = _by_path(outcome, *makes), _by_path(outcome, *takes)
    for path in sorted(made.keys() | taken.keys()):
        if not path.startswith(prefix):
            continue
        exists = path in outcome.tree
        makers, takers = made[path], taken[path]
        most = len(makers) - sum(map(outcome.certain, takers))
        least = sum(map(outcome.certain, makers)) - len(takers)
        if not least <= exists <= most:
            yield f"{path}: made by {_who(makers)}, taken by {_who(takers)}, there: {exists}"


def _who(calls: list[Call]) -> str:
    return ", ".join(call.who for call in calls) or "nobody"


def judge_cross(outcome: Outcome, folder: str) -> Iterator[str]:
    """Each file was removed once, or is there and whole."""
    yield from judge_counts(outcome, ("create",), ("unlink",), f"{folder}/")
    for path, seen in outcome.tree.items():
        if path.startswith(f"{folder}/"):
            who, number = path.rpartition("/")[2].rsplit(".", 1)
            if seen.value and seen.value not in ([who, int(number)], [who, int(number) + 1]):
                yield f"{path}: holds {seen.value}"


_KINDS = {"create": "file", "link": "file", "mkdir": "dir", "symlink": "symlink"}


def judge_create(outcome: Outcome, folder: str) -> Iterator[str]:
    """Each name has one winner, and is what the winner made."""
    links: Counter[str] = Counter()
    names = _by_path(outcome, *_KINDS)
    for path, winners in sorted(names.items()):
        if not path.startswith(f"{folder}/"):
            continue
        seen = outcome.tree.get(path)
        certain = [call for call in winners if outcome.certain(call)]
        if len(certain) > 1:
            yield f"{path} was made by {_who(certain)}"
        if seen is None:
            if certain:
                yield f"{path} is gone that {_who(certain)} made"
        elif not any(_is_made_by(seen, call) for call in certain or winners):
            yield f"{path} is {seen}, made by {_who(winners)}"
    for path, seen in outcome.tree.items():
        if not path.startswith(f"{folder}/") or path.startswith(f"{folder}/source."):
            continue
        if path not in names:
            yield f"{path} was made by nobody"
        if seen.kind == "file" and seen.value:
            links[seen.value[0]] += _is_link(outcome, path)
    for who in {call.who for call in outcome.calls}:
        source = outcome.tree.get(f"{folder}/source.{who}")
        if source is not None and source.links != 1 + links[who]:
            yield f"source.{who} has {source.links} links and {links[who]} further names"


def _is_link(outcome: Outcome, path: str) -> bool:
    """Whether a file is a further name of a source: its link count says so, too."""
    made = [call for call in outcome.named("link", "create") if call.path == path]
    certain = [call for call in made if outcome.certain(call)]
    return any(call.name == "link" for call in certain or made)


def _is_made_by(seen: Seen, call: Call) -> bool:
    if seen.kind != _KINDS[call.name]:
        return False
    value = {"file": [call.who, 0], "symlink": call.who, "dir": None}[seen.kind]
    # A file is empty between its making and the write after it; the maker may have died there.
    return seen.value == value or (seen.kind == "file" and seen.value is None and not seen.size)


def judge_directories(outcome: Outcome, folder: str) -> Iterator[str]:
    """What moves is there once; what is replaced leaves one; the yard was made and removed in
    turns."""
    places = Counter(
        path.rpartition("/")[2] for path in outcome.tree if path.startswith(f"{folder}/")
    )
    for name in ("a", "b", "box", "deep", "crowns", *(f"token.{n}" for n in range(5))):
        if places[name] != 1:
            yield f"{name} is there {places[name]} times"
    for path, seen in outcome.tree.items():
        name = path.rpartition("/")[2]
        if name.startswith("token.") and seen.value != ["token", int(name[6:])]:
            yield f"{path} holds {seen.value}"
    yield from _judge_crowns(outcome, f"{folder}/crowns")
    for name, make, take in (("yard", "mkdir", "rmdir"), ("yard/tree", "create", "unlink")):
        yield from judge_counts(outcome, (make,), (take,), f"{folder}/{name}")


def _judge_crowns(outcome: Outcome, folder: str) -> Iterator[str]:
    crowned = [c for c in outcome.named("rename") if c.facts["to"] == f"{folder}/crown"]
    crown = outcome.tree.get(f"{folder}/crown")
    if crown is None and any(map(outcome.certain, crowned)):
        yield "there is no crown"
    if crown is not None and crown.value:
        who, number = crown.value
        if f"{folder}/{who}.{number}" not in {call.path for call in crowned}:
            yield f"the crown is of {crown.value}"
    if crown is not None and crown.links != 1:
        yield f"the crown has {crown.links} links"
    left = [path for path in outcome.tree if path.startswith(f"{folder}/") and "." in path]
    lost = tuple(f"{folder}/{prefix}{who}." for who in outcome.lost for prefix in ("", "dir."))
    yield from (f"{path} is left" for path in left if not lost or not path.startswith(lost))


def judge_files(outcome: Outcome, folder: str) -> Iterator[str]:
    """What is read was written there by somebody before."""
    writes = {
        (call.path, call.who, call.facts["number"]): call.begin_ns
        for call in outcome.named("write")
        if "number" in call.facts
    }
    for call in outcome.calls:
        value = call.facts.get("value")
        if call.name == "read" and value is not None and call.path.startswith(f"{folder}/"):
            begin_ns = writes.get((call.path, *value))
            if begin_ns is None or begin_ns > (call.end_ns or 0):
                yield f"{call.who} reads {value} in {call.path}, which was not written there"
    for path, seen in outcome.tree.items():
        if path.startswith(f"{folder}/") and seen.value and (path, *seen.value) not in writes:
            yield f"{path} holds {seen.value}, which was not written there"


def judge_append(outcome: Outcome, folder: str) -> Iterator[str]:
    """Nothing is lost but what was cut, nothing doubled; the order is that of the calls."""
    for name, cut in (("grows", None), ("cut", "cut"), ("emptied", "empty")):
        path = f"{folder}/{name}"
        appends = {
            (call.who, call.facts["number"]): call
            for call in outcome.named("append")
            if call.path == path
        }
        held = [(who, number) for who, number in outcome.tree[path].value or ()]
        if len(set(held)) < len(held):
            yield f"{path} has records twice"
        yield from (f"{path} has {one}, appended by nobody" for one in held if one not in appends)
        cuts = [call for call in outcome.named(cut or "") if call.path == path]
        last_cut_ns = max((call.end_ns or 2**63 for call in cuts), default=0)
        for one, call in appends.items():
            if outcome.certain(call) and call.begin_ns > last_cut_ns and one not in held:
                yield f"{path}: {one} is lost"
        yield from _judge_order(path, [appends[one] for one in held if one in appends])
        if cut is None:
            yield from _judge_prefixes(path, held, appends, outcome)


def _judge_order(path: str, calls: list[Call]) -> Iterator[str]:
    latest_ns = 0
    for before, call in pairwise(calls):
        latest_ns = max(latest_ns, before.begin_ns)
        if call.end_ns is not None and call.end_ns < latest_ns:
            yield f"{path}: {call.who} {call.facts['number']} stands behind a later one"


def _judge_prefixes(
    path: str,
    held: list[tuple[str, int]],
    appends: dict[tuple[str, int], Call],
    outcome: Outcome,
) -> Iterator[str]:
    """Of a killed node's records the last ones may be missing, and no others."""
    for who in outcome.lost:
        all_of = sorted(number for one, number in appends if one == who)
        there = [number for one, number in held if one == who]
        if there != all_of[: len(there)]:
            yield f"{path}: of {who} there is {there} of {all_of}"


def judge_own(outcome: Outcome, folder: str) -> Iterator[str]:
    """What was synced is there, and whole."""
    yield from judge_counts(outcome, ("create",), ("unlink",), f"{folder}/")
    for call in outcome.named("write"):
        seen = outcome.tree.get(call.path)
        if seen is not None and call.path.startswith(f"{folder}/") and outcome.certain(call):
            who, number = call.path.rpartition("/")[2].rsplit(".", 1)
            if seen.value != [who, int(number)]:
                yield f"{call.path}: holds {seen.value}"


JUDGES: dict[str, Callable[[Outcome, str], Iterator[str]]] = {
    "cross": judge_cross,
    "inodes": judge_cross,
    "create": judge_create,
    "directories": judge_directories,
    "files": judge_files,
    "append": judge_append,
    "own": judge_own,
}
