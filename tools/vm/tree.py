"""Every entry of a mounted volume: what Linux listed, what we read, and how the two differ."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from tools.vm.report import Report

UNREADABLE: Final = "unreadable"
_DIFFERENCES_SHOWN: Final = 10
_LOST_AND_FOUND: Final = b"lost+found"


@dataclass(frozen=True)
class Entry:
    """One entry. `content`: sha256 of a file's bytes or a link's target; empty for folders."""

    mode: int
    links: int
    size: int
    content: str
    mtime_s: int = -1
    """When it was changed, -1: not known."""

    def agrees(self, other: Entry) -> bool:
        """Whether both can be the same entry."""
        if -1 in (self.mtime_s, other.mtime_s):
            return replace(self, mtime_s=-1) == replace(other, mtime_s=-1)
        return self == other

    def __str__(self) -> str:
        """For a person."""
        return (
            f"mode {self.mode:o}, {self.links} links, {self.size} bytes, "
            f"changed {self.mtime_s}, {self.content[:12]}"
        )


Tree = dict[bytes, Entry]
"""Entries by path; the root is empty, no path begins with a slash."""


def digest(data: bytes) -> str:
    """What `content` of an entry is made with."""
    return hashlib.sha256(data).hexdigest()


def from_report(report: Report, name: str) -> Tree:
    """The tree that the machine listed as `name`; empty when it did not get so far."""

    def part(which: str) -> bytes:
        return report.data.get(f"{name}-{which}", b"")

    names = part("names").split(b"\0")[:-1]
    contents = _sums(part("files").split(b"\0")[:-1], part("sums"))
    links = part("links").split(b"\0")[:-1]
    targets = part("targets").split(b"\0")[:-1]
    contents |= {
        link: digest(target) for link, target in zip(links, targets, strict=False) if target
    }
    tree = {}
    stats = _Lines(part("stats"))
    for path in names:
        line = stats.take(b" " + path)
        mode, links_count, size, mtime_s = _fields(line)
        content = ""
        if not stat.S_ISDIR(mode):
            content = contents.get(path, UNREADABLE)
        elif mode:
            size = 0  # of a folder it is how the file system stores it
        tree[_relative(path)] = Entry(mode, links_count, size, content, mtime_s)
    return tree


class _Lines:
    """Lines that end with a known text; newlines inside that text are no end."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._position = 0

    def take(self, ending: bytes) -> bytes | None:
        """What stands before `ending` in the next line; None when the next line is another's."""
        end = self._text.find(ending + b"\n", self._position)
        line = self._text[self._position : end]
        if end < 0 or b"\n" in line:
            return None
        self._position = end + len(ending) + 1
        return line


def _sums(files: list[bytes], text: bytes) -> dict[bytes, str]:
    lines = _Lines(text)
    sums = ((path, lines.take(b"  " + path)) for path in files)
    return {path: line.decode(errors="replace") for path, line in sums if line is not None}


def _fields(line: bytes | None) -> tuple[int, int, int, int]:
    """Mode, links, size, time of a line of `stats`; zeros when there is none."""
    words = (line or b"").split()
    if len(words) != 6:
        return 0, 0, 0, -1
    return int(words[0], 16), int(words[3]), int(words[4]), int(words[5])


def _relative(path: bytes) -> bytes:
    return path.removeprefix(b".").removeprefix(b"/")


def to_json(tree: Mapping[bytes, Entry]) -> dict[str, tuple[int, int, int, str, int]]:
    """For another process: paths in hexadecimal."""
    return {
        path.hex(): (entry.mode, entry.links, entry.size, entry.content, entry.mtime_s)
        for path, entry in tree.items()
    }


def from_json(record: Mapping[str, tuple[int, int, int, str, int]]) -> Tree:
    """What `to_json` made."""
    return {bytes.fromhex(path): Entry(*fields) for path, fields in record.items()}


def compare(wanted: Mapping[bytes, Entry], found: Mapping[bytes, Entry]) -> list[str]:
    """How `found` differs; the folder that fsck wants at the root may be in one only."""
    lines = []
    for path in sorted(wanted.keys() | found.keys()):
        have = found.get(path)
        want = wanted.get(path)
        if path == _LOST_AND_FOUND or not path:
            continue
        if have and want and have.agrees(want):
            continue
        lines.append(f"{path!r}: {have or 'missing'} instead of {want or 'nothing'}")
    if len(lines) > _DIFFERENCES_SHOWN:
        more = len(lines) - _DIFFERENCES_SHOWN
        lines[_DIFFERENCES_SHOWN:] = [f"and {more} more differences"]
    return lines


def unreadable(tree: Mapping[bytes, Entry]) -> list[str]:
    """Entries that could be listed but not read."""
    return [
        f"{path!r} can't be read"
        for path, entry in tree.items()
        if entry.content == UNREADABLE or not entry.mode
    ][:_DIFFERENCES_SHOWN]
