"""The look that nodes take now and then at all orphans of a volume.

An orphan that is still open somewhere when its last name goes is left to its last closer. When a
remover and a closer each take the other for the one that still has it open, because a lock's
unlock is under way, or when the closer dies, nobody frees it; the scan does.

The nodes share the work: the value of the orphan scan lock (kind P) counts the scans. A node that
finds another count than it knew lets this time pass, because another node has scanned meanwhile.

Differs from Linux (`ocfs2_queue_orphan_scan`): a value that is lost with its owner makes the next
node scan, not wait for one more interval. The scan goes one orphan at a time, between other work.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from fs.dlm.modes import Mode
from fs.ocfs2.files import Files
from fs.ocfs2.locking import ORPHAN_SCAN, VALUE_BYTES, lock_name
from fs.ocfs2.names import Names
from fs.ocfs2.recovery import freeing_orphans
from fs.ocfs2.volume import Volume

SCAN_LOCK: Final = lock_name(ORPHAN_SCAN, 0)
_VALUE: Final = struct.Struct(">B3xI")
_VALUE_VERSION: Final = 1
_COUNTS: Final = 1 << 32


class OrphanScan:
    """The scans of one mount."""

    def __init__(self, volume: Volume, files: Files, names: Names) -> None:
        self._volume = volume
        self._files = files
        self._names = names
        self._count = 0
        """Scans that this node knows of."""

    def run(self) -> Iterator[int]:
        """One scan of all slots, unless another node has scanned since the last call. After each
        orphan that was looked at: how many were freed by then."""
        if not self._is_due():
            return
        freed = 0
        for slot in range(self._volume.super.slots):
            for done in freeing_orphans(self._volume, self._files, self._names, slot):
                freed += done
                yield freed

    def _is_due(self) -> bool:
        """Whether nobody has scanned; then this node is the one that does. The lock is not kept
        while it scans."""
        locks = self._volume.locks.locks
        locks.acquire(SCAN_LOCK, Mode.EX)
        try:
            count = _decode(locks.value(SCAN_LOCK))
            if count is not None and count != self._count:
                self._count = count
                return False
            self._count = (self._count + 1) % _COUNTS
            locks.set_value(SCAN_LOCK, _encode(self._count))
            return True
        finally:
            locks.release(SCAN_LOCK, Mode.EX)


def _encode(count: int) -> bytes:
    return _VALUE.pack(_VALUE_VERSION, count).ljust(VALUE_BYTES, b"\0")


def _decode(value: bytes | None) -> int | None:
    """None: nobody knows."""
    if value is None or len(value) != VALUE_BYTES:
        return None
    if not any(value):
        return 0  # a lock that nobody has written to
    version, count = _VALUE.unpack_from(value)
    return count if version == _VALUE_VERSION else None
