"""The audit log of a cluster's hypervisor as events, from its oldest line on.

The hypervisor turns `audit.log` over to `audit.log.1` when it is full (`hypervisor.audit`); who
follows it goes on with the new file after the last line of the old one.  A line that is still being
written waits for its end, and one that is no event, because a disk was full or a hand has been at
it, is passed over and counted.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from tools.rundir import ClusterDirectory

Event = dict[str, str]
"""`time`, `guest`, `event`, and the words of that event."""

_LOOK_SECONDS: Final = 0.2
_CHUNK_BYTES: Final = 1 << 20
_LINE: Final = re.compile(r'(\S+Z)((?: \w+=(?:"[^"]*"|[^\s"]+))+)')
_WORD: Final = re.compile(r'(\w+)=("[^"]*"|[^\s"]+)')


class AuditReader:
    """Events about a guest, of some kinds; without either all of them."""

    def __init__(
        self,
        directory: ClusterDirectory,
        *,
        guest: str | None = None,
        events: Collection[str] = (),
    ) -> None:
        self._directory = directory
        self._path = directory.logs / "audit.log"
        self._guest = guest
        self._events = frozenset(events)
        self.unreadable = 0
        """Lines that are no event."""

    def events(self, *, follow: bool) -> Iterator[tuple[str, Event]]:
        """Lines with what they say; with `follow` new ones until the cluster has ended."""
        for line in self._lines(follow=follow):
            event = parse(line)
            if event is None:
                self.unreadable += 1
            elif self._is_wanted(event):
                yield line, event

    def _is_wanted(self, event: Event) -> bool:
        about = (event.get("guest"), event.get("about"))
        return (self._guest is None or self._guest in about) and (
            not self._events or event["event"] in self._events
        )

    def _lines(self, *, follow: bool) -> Iterator[str]:
        file, older = self._open_both()
        try:
            if older is not None:
                yield from older.lines()
            while True:
                # Asked before the last look, so that nothing is written after it.
                record = self._directory.read()
                lives = record is not None and record.lives
                if file is not None:
                    yield from file.lines()
                if self._was_turned_over(file):
                    if file is not None:
                        yield from file.lines()
                        file.close()
                    file = _open(self._path)
                elif follow and lives:
                    time.sleep(_LOOK_SECONDS)
                else:
                    return
        finally:
            for one in (file, older):
                if one is not None:
                    one.close()

    def _open_both(self) -> tuple[_File | None, _File | None]:
        """Again if the log is turned over between the two."""
        while True:
            file = _open(self._path)
            older = _open(self._path.with_suffix(".log.1"))
            if file is None or older is None or not os.path.samestat(file.status, older.status):
                return file, older
            file.close()
            older.close()

    def _was_turned_over(self, file: _File | None) -> bool:
        try:
            now = self._path.stat()
        except OSError:
            return False
        return file is None or not os.path.samestat(now, file.status)


class _File:
    """A file that grows."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.status = os.fstat(self._file.fileno())
        self._begun = b""

    def lines(self) -> Iterator[str]:
        """Whole lines that were not read before."""
        while chunk := self._file.read(_CHUNK_BYTES):
            *whole, self._begun = (self._begun + chunk).split(b"\n")
            yield from (line.decode("ascii", "replace") for line in whole)

    def close(self) -> None:
        self._file.close()


def names(directory: ClusterDirectory) -> set[str]:
    """Whom the log may be asked about: who was enrolled, and who is in it (anybody may knock under
    any name)."""
    roster = directory.path / "guests"
    found = set(os.listdir(roster)) if roster.is_dir() else set()
    for _, event in AuditReader(directory).events(follow=False):
        found |= {event["guest"], event.get("about", "administrator")}
    return {name for name in found if not name.startswith(".")}


def _open(path: Path) -> _File | None:
    try:
        return _File(path)
    except FileNotFoundError:
        return None


def parse(line: str) -> Event | None:
    """What a line says; None if it is no event."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    words = {key: value.strip('"') for key, value in _WORD.findall(found[2])}
    if not {"guest", "event"} <= words.keys():
        return None
    return {"time": found[1], **words}
