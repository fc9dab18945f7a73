"""When a node looks for orphans that nobody freed (`fs.ocfs2.orphanscan`).

Every `interval_ns` and up to a sixtieth more, so that nodes that started together don't go on doing
everything together. A scan is done one orphan at a time between steps of work.

Linux: every 300 to 305 seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Final

from fs.ocfs2.filesystem import Ocfs2

log = logging.getLogger(__name__)

INTERVAL_NS: Final = 300_000_000_000
_JITTER_SHARE: Final = 60


class OrphanScanner:
    """The scans of one node, one after the other."""

    def __init__(self, interval_ns: int, random_bytes: Callable[[int], bytes]) -> None:
        self._interval_ns = interval_ns
        self._random_bytes = random_bytes
        self._due_ns: int | None = None
        self._running: Iterator[int] | None = None
        self._freed_in_this = 0
        self.freed = 0
        """Orphans, by all scans of this node."""

    def step(self, fs: Ocfs2, now_ns: int) -> None:
        """Begin a scan when it is time, or go on with one.

        OSError, of the disk or of locks while the cluster changes, ends that scan; the next may do
        better.
        """
        if self._due_ns is None:
            self._due_ns = self._next(now_ns)
        if self._running is None:
            if now_ns < self._due_ns or fs.read_only:
                return
            self._due_ns = self._next(now_ns)
            self._running = fs.scan_orphans()
            self._freed_in_this = 0
        try:
            freed = next(self._running, None)
        except OSError:
            self._running = None
            raise
        if freed is None:
            self._running = None
            if self._freed_in_this:
                log.info("event=orphan_scan freed=%d", self._freed_in_this)
            return
        self.freed += freed - self._freed_in_this
        self._freed_in_this = freed

    def _next(self, now_ns: int) -> int:
        jitter = int.from_bytes(self._random_bytes(4), "little")
        return now_ns + self._interval_ns + jitter % max(1, self._interval_ns // _JITTER_SHARE)
