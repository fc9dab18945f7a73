"""The audit log: one line an event that somebody may have to answer for.

    2026-11-25T10:03:07.120Z guest=alpha event=fault reason=bad_slot detail="63+2"
    2026-11-25T10:03:07.121Z guest=alpha event=suppressed lines=3120

In `log/audit.log` of the run directory; `tmem audit` reads it.

  event       of whom          what it says
  fault       guest            a broken rule of the ABI: which, and how
  denied      guest            no grant for a shared pool, or a reader's put or flush
  stale       guest            a put under an older fencing token than was needed
  refused     guest, or ?      an attachment, or a connection to the control socket
  detached    guest            thrown out for so many faults
  reported    guest            says of a page that it is not what it must be; who put it (below)
  checksum    guest            asked for a page that is not what was put, and by whom it was
  suppressed  as the lines     how many lines of it were left out
  quarantine, auth, set, ...   every change that the administrator makes; `about` is the guest

A guest can't fill the disk: each has a bucket of `BURST_LINES` that fills up again at
`LINES_PER_SECOND`, what does not fit is counted and told with the next line that does or when the
flood is over (`settle`), and the file is turned over to `audit.log.1` at `FILE_BYTES_MAX`.  Events
are counted before they are dropped (`counts`), so no figure depends on the file.  What no guest can
bring about at will, damage, has a bucket of its own, so that no flood hides it.

That a reported page is wrong is a claim of the guest: nothing but this line follows from it, and
nobody is to be judged by it alone.  So are `object` and `index`.  `put_by`, `pid`, `after`,
`before` and `token` are known, and told only if the bytes that the guest got are those that are
there; else `page` is `replaced` or `gone`, and nobody is named.

What a guest says of itself is never written raw: details are printable ASCII and bounded.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

AUDIT_LOG: Final = "audit.log"
BURST_LINES: Final = 50
LINES_PER_SECOND: Final = 5.0
FILE_BYTES_MAX: Final = 16 * 2**20
_DETAIL_CHARACTERS_MAX: Final = 96
_UNPROVOKED: Final = frozenset(("checksum",))
"""Events that no guest can bring about."""
ADMINISTERED: Final = frozenset(
    (
        "auth",
        "balloon",
        "destroy",
        "flush",
        "freeze",
        "quarantine",
        "reseed",
        "rotated",
        "schedule",
        "set",
        "thaw",
    )
)
"""Verbs of the administrator that change something."""
EVENTS: Final = (
    "fault",
    "denied",
    "stale",
    "refused",
    "detached",
    "reported",
    "checksum",
    "suppressed",
    *sorted(ADMINISTERED),
)
"""All that there are: who asks for another one has mistyped it."""


class _Bucket:
    __slots__ = ("at_seconds", "lines", "suppressed")

    def __init__(self, now_seconds: float) -> None:
        self.lines = float(BURST_LINES)
        self.at_seconds = now_seconds
        self.suppressed = 0

    def refill(self, now_seconds: float) -> None:
        gained = max(0.0, now_seconds - self.at_seconds) * LINES_PER_SECOND
        self.at_seconds = now_seconds
        self.lines = min(float(BURST_LINES), self.lines + gained)


class Audit:
    """`now_seconds` is a wall clock (seconds since 1970).  A log that can't be written is not worth
    a hypervisor: what fails is counted in `lost`."""

    def __init__(self, directory: Path, now_seconds: Callable[[], float]) -> None:
        self._path = directory / AUDIT_LOG
        self._now_seconds = now_seconds
        self._buckets: dict[tuple[str, bool], _Bucket] = {}
        """By guest, and whether it is for what the guest does at will."""
        self._flooded: set[tuple[str, bool]] = set()
        """Buckets with lines that were left out."""
        self._file: int | None = None
        self._bytes = 0
        self.counts: dict[str, int] = {}
        self.lost = 0

    def record(self, guest: str, event: str, **fields: object) -> None:
        """One of `EVENTS` of a guest (or of "administrator")."""
        assert event in EVENTS, event
        self.counts[event] = self.counts.get(event, 0) + 1
        now_seconds = self._now_seconds()
        key = guest, event not in _UNPROVOKED
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(now_seconds)
        bucket.refill(now_seconds)
        if bucket.lines < 1:
            bucket.suppressed += 1
            self._flooded.add(key)
            return
        bucket.lines -= 1
        if bucket.suppressed:
            self._tell_suppressed(now_seconds, key, bucket)
        self._write(now_seconds, guest, event, fields)

    def settle(self) -> None:
        """Tell what was left out of those whose flood is over: their buckets are full again.  Costs
        nothing while nobody floods."""
        for key in list(self._flooded):
            bucket = self._buckets[key]
            now_seconds = self._now_seconds()
            bucket.refill(now_seconds)
            if bucket.lines >= BURST_LINES:
                bucket.lines -= 1
                self._tell_suppressed(now_seconds, key, bucket)

    def _tell_suppressed(self, now_seconds: float, key: tuple[str, bool], bucket: _Bucket) -> None:
        self._write(now_seconds, key[0], "suppressed", {"lines": bucket.suppressed})
        bucket.suppressed = 0
        self._flooded.discard(key)

    def _write(self, now_seconds: float, guest: str, event: str, fields: dict[str, object]) -> None:
        words = "".join(f" {key}={_printable(value)}" for key, value in fields.items())
        line = f"{stamp(now_seconds)} guest={guest} event={event}{words}\n".encode("ascii")
        try:
            if self._file is None or self._bytes + len(line) > FILE_BYTES_MAX:
                self._open()
            assert self._file is not None
            self._bytes += os.write(self._file, line)
        except OSError:
            self.lost += 1

    def _open(self) -> None:
        self.close()
        if self._path.exists() and self._path.stat().st_size + 4096 > FILE_BYTES_MAX:
            self._path.replace(self._path.with_suffix(".log.1"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o600)
        self._bytes = os.fstat(self._file).st_size

    def record_counts(self) -> dict[str, object]:
        """Events by kind since the start, and lines that could not be written."""
        return {"events": dict(self.counts), "lost_lines": self.lost}

    def close(self) -> None:
        """Close the file; the next event opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def stamp(now_seconds: float) -> str:
    """A time as the log has it."""
    time = datetime.datetime.fromtimestamp(now_seconds, datetime.UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _printable(value: object) -> str:
    """A value as one word, or in quotes; nothing in it can end the line or forge another."""
    text = ascii(str(value))[1:-1][:_DETAIL_CHARACTERS_MAX]
    plain = text and all(letter.isalnum() or letter in "_.+-:/" for letter in text)
    return text if plain else '"' + text.replace('"', "'") + '"'
