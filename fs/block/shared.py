"""One image file used by several nodes at once.

Every write is checked twice: against the node's own lease (it stops itself in time, see
`fs.cluster.fencing`), and against its reservation (others stop it, see `reservations`). The first
is cheap and ends a node's work early and with a clear reason; the second holds even for a process
that was stopped between its check and its write.

Reads and flushes are checked against the lease too: a fenced node must not answer with old data,
nor say that something is durable.

Sectors of the heartbeat area are read without a check and written under the reservation only: the
lease comes from them.

Invariants: those of every `BlockDevice`, and
  S1  after `preempt(n, key)` returned True, no byte written by node n under that key reaches the
      image;
  S2  a write that was refused moved nothing, and is counted in `refused`.

The image is locked (`flock`) as shared, so that `FileDevice` refuses to write to it meanwhile.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import Protocol

from fs.block.device import BLOCK_BYTES, Bytes, check_extent
from fs.block.file import FileDevice
from fs.block.reservations import ReservationConflict, Reservations
from fs.errors import error

SECTOR_BYTES = 512

_log = logging.getLogger(__name__)


class Lease(Protocol):
    """What the device asks before each operation; `fs.cluster.fencing.Fence` is one."""

    def check(self) -> None:
        """Raise `OSError` EIO when this node must not touch the disk."""
        ...


class SharedDevice:
    """The image at `path` for node `node` with reservation key `key`.

    `lease` may be set once it exists; without one only the reservation is checked.
    """

    block_bytes = BLOCK_BYTES
    read_only = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        node: int,
        key: int,
        *,
        lease: Lease | None = None,
        names: dict[int, str] | None = None,
    ) -> None:
        self.node = node
        self.key = key
        self.lease = lease
        self.refused = 0
        # The read-only FileDevice gives the checks of the path and the shared lock.
        self._reader = FileDevice(path, read_only=True, made_by="tmem mkfs")
        self.path = self._reader.path
        self.blocks = self._reader.blocks
        self._fd = -1
        self._reservations: Reservations | None = None
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            self._reservations = Reservations(f"{self.path}.reservations", names)
            self._reservations.register(node, key)
        except BaseException:
            self.close()
            raise

    @property
    def reservations(self) -> Reservations:
        """The table; EIO when the device is closed."""
        if self._reservations is None:
            raise error(errno.EIO, f"image {self.path} is closed")
        return self._reservations

    def read(self, block: int, count: int, into: memoryview) -> None:
        """Read whole blocks, under the lease."""
        if self.lease is not None:
            self.lease.check()
        self._reader.read(block, count, into)

    def write(self, block: int, count: int, data: Bytes) -> None:
        """Write whole blocks, under lease and reservation."""
        view = memoryview(data)
        check_extent(self, block, count, view.nbytes)
        if self.lease is not None:
            try:
                self.lease.check()
            except OSError:
                self.refused += 1
                raise
        self._guarded_write(view[: count * BLOCK_BYTES], block * BLOCK_BYTES)

    def flush(self) -> None:
        """`fdatasync` of the image, under the lease."""
        if self.lease is not None:
            self.lease.check()
        os.fdatasync(self._fd)

    def read_sectors(self, sector: int, count: int) -> bytes:
        """The bytes of `count` sectors of 512 bytes."""
        if sector < 0 or count <= 0 or (sector + count) * SECTOR_BYTES > self.blocks * BLOCK_BYTES:
            raise error(errno.EINVAL, f"sectors {sector}..{sector + count - 1} of {self.path}")
        data = os.pread(self._fd, count * SECTOR_BYTES, sector * SECTOR_BYTES)
        if len(data) != count * SECTOR_BYTES:
            raise error(errno.EIO, f"image {self.path} ends at sector {sector}")
        return data

    def write_sector(self, sector: int, data: bytes) -> None:
        """Write one sector, under the reservation."""
        if len(data) != SECTOR_BYTES or not 0 <= sector < self.blocks * BLOCK_BYTES // SECTOR_BYTES:
            raise error(errno.EINVAL, f"sector {sector} of {self.path}, {len(data)} bytes")
        self._guarded_write(memoryview(data), sector * SECTOR_BYTES)

    def preempt(self, node: int, key: int) -> bool:
        """Stop the writes of that incarnation of `node`.

        True: it can't write any more. False: one write may be under way, call again.
        """
        return self.reservations.preempt(node, key, self.node)

    def gone(self, node: int, key: int) -> bool:
        """Whether the process of that incarnation of `node` has certainly ended."""
        return self.reservations.gone(node, key)

    def finish_off(self, node: int, key: int) -> bool:
        """Kill the process of a preempted node that was stopped inside a write."""
        killed = self.reservations.finish_off(node, key)
        if killed:
            _log.error("%s was stopped inside a write and is killed", self.reservations.label(node))
        return killed

    def close(self) -> None:
        """Give reservation and image back."""
        if self._reservations is not None:
            self._reservations.unregister(self.node, self.key)
            self._reservations.close()
            self._reservations = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._reader.close()

    def _guarded_write(self, view: memoryview, offset: int) -> None:
        try:
            with self.reservations.guarded(self.node, self.key):
                self._write_now(view, offset)
        except ReservationConflict as reason:
            if self.refused == 0:
                _log.error("image %s: a write is refused: %s", self.path, reason.strerror)
            self.refused += 1
            raise

    def _write_now(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)
