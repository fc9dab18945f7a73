"""Who may write to a shared image: a table beside it, like SCSI-3 persistent reservations.

The file IMAGE.reservations has one record for each node. A node registers a key (its heartbeat
generation). `preempt` by a survivor takes the key away, and once it has returned True no write of
that incarnation can reach the image any more, however the victim was stopped and resumed.

How: each write holds a shared lock on the node's guard byte (a lock of the open file description,
`F_OFD_SETLK`), then looks at the key, then writes, then lets the byte go. Preempting clears the key
first and then asks the kernel whether anyone holds the byte. Either the writer saw the cleared key,
or the preemptor sees the byte and waits. Preempting never takes the byte, so nobody ever waits for
a preemptor that was stopped itself.

A victim that was stopped between its look and its write holds the byte for as long as it sleeps.
`finish_off` kills that very process (pid and start time from the record, through a pidfd): in that
state nothing else makes sure that its write won't come. o2cb's fencing restarts the machine, so
this is no more than what a fenced node is used to.

A second byte for each node, held for as long as the node runs, keeps two processes from running
with one node number.

Where it differs from SCSI: the check and the write are one step inside a SCSI target, here they are
two steps under a lock; keys don't survive a restart of the host in any useful sense (all writers
are gone by then); all nodes must be on one host and trust each other not to write past the table.

File: 64 bytes of header (magic, version, records), then 64 bytes a node (`_RECORD`), little endian.
Locks: byte n guards node n, byte 256 + n is held by the running node n, byte 512 while the file is
made.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fs.errors import ImageError

NODES: Final = 255
_MAGIC: Final = b"tmemresv"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sII48x")
_RECORD: Final = struct.Struct("<QQIiQ32x")  # key, last key, pid, preempted by, process start time
_BYTES: Final = _HEADER.size + NODES * _RECORD.size
_OWNER_BYTE: Final = 256
_MAKING_BYTE: Final = 512
_FLOCK: Final = struct.Struct("@hhqqi4x")
_NOBODY: Final = -1


class ReservationConflict(OSError):
    """A write by a node that has no key (any more)."""


class Reservations:
    """The table at `path`; made when it is missing. `ImageError` when it is something else."""

    def __init__(self, path: str | os.PathLike[str], names: dict[int, str] | None = None) -> None:
        self.path = Path(path)
        self._names = names or {}
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as reason:
            raise ImageError(
                f"reservations {self.path}: can't be opened ({os.strerror(reason.errno or 0)});"
                " the folder of a shared image must be writable"
            ) from reason
        try:
            self._map = self._make_or_check()
        except BaseException:
            os.close(self._fd)
            raise
        # Keys are read and written as one machine word, so that nobody sees half of one.
        self._words = memoryview(self._map).cast("Q")
        self._closed = False

    def _make_or_check(self) -> mmap.mmap:
        _lock(self._fd, fcntl.F_WRLCK, _MAKING_BYTE, wait=True)
        try:
            size = os.fstat(self._fd).st_size
            if size == 0:
                os.pwrite(self._fd, _HEADER.pack(_MAGIC, _VERSION, NODES).ljust(_BYTES, b"\0"), 0)
            elif size != _BYTES or os.pread(self._fd, _HEADER.size, 0) != _HEADER.pack(
                _MAGIC, _VERSION, NODES
            ):
                raise ImageError(
                    f"reservations {self.path}: is no table of this version;"
                    " remove it when no node uses the image"
                )
        finally:
            _lock(self._fd, fcntl.F_UNLCK, _MAKING_BYTE)
        return mmap.mmap(self._fd, _BYTES)

    def register(self, node: int, key: int) -> None:
        """This process is node `node` from now on, under `key`.

        A former incarnation's writes are over when this returns. `ImageError` when another
        process runs as this node.
        """
        if not 0 < key < 1 << 64 or not 0 <= node < NODES:
            raise ValueError(f"node {node}, key {key}")
        if not _lock(self._fd, fcntl.F_WRLCK, _OWNER_BYTE + node):
            raise ImageError(
                f"reservations {self.path}: {self.label(node)} is run by process"
                f" {self._record(node)[2]} already; stop it or use another node number"
            )
        self._words[_word(node)] = 0
        if self.writing(node):
            raise ImageError(
                f"reservations {self.path}: a write of {self.label(node)}'s former process is"
                " still under way; wait for its end"
            )
        _RECORD.pack_into(
            self._map, _offset(node), 0, key, os.getpid(), _NOBODY, _start_time(os.getpid())
        )
        self._words[_word(node)] = key

    def unregister(self, node: int, key: int) -> None:
        """Give the key back, if it is still ours, and the node number with it."""
        if self._words[_word(node)] == key:
            self._words[_word(node)] = 0
        _lock(self._fd, fcntl.F_UNLCK, _OWNER_BYTE + node)

    def key(self, node: int) -> int:
        """The registered key; 0 for none."""
        return self._words[_word(node)]

    def writing(self, node: int) -> bool:
        """Whether a write of `node` is under way."""
        return self._held(node)

    def _held(self, byte: int) -> bool:
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, request)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def gone(self, node: int, key: int) -> bool:
        """Whether the process that registered `key` has certainly ended, or closed the image."""
        return self._record(node)[1] == key and not self._held(_OWNER_BYTE + node)

    @contextlib.contextmanager
    def guarded(self, node: int, key: int) -> Iterator[None]:
        """Around each write of the image. `ReservationConflict` when the key is gone."""
        if not _lock(self._fd, fcntl.F_RDLCK, node):
            raise ReservationConflict(
                errno.EIO, f"the guard byte of {self.label(node)} is held exclusively"
            )
        try:
            if self._words[_word(node)] != key:
                raise ReservationConflict(errno.EIO, self._why_gone(node, key))
            yield
        finally:
            _lock(self._fd, fcntl.F_UNLCK, node)

    def preempt(self, node: int, key: int, by: int) -> bool:
        """Take the key `key` of `node` away.

        True: no write under that key can reach the image any more. False: one may be under way,
        ask again. Another key of that node is left alone: `register` has ended the old one.
        """
        if self._words[_word(node)] == key:
            _, last, pid, _, start = self._record(node)
            _RECORD.pack_into(self._map, _offset(node), key, last, pid, by, start)
            self._words[_word(node)] = 0
        elif self._words[_word(node)]:
            return True
        return not self.writing(node)

    def finish_off(self, node: int, key: int) -> bool:
        """Kill the preempted process that still holds its guard byte. False: not possible."""
        _, last, pid, _, start = self._record(node)
        if last != key or not self.writing(node) or pid == os.getpid():
            return False
        try:
            process = os.pidfd_open(pid)
        except OSError:
            return False
        try:
            if _start_time(pid) != start:
                return False
            signal.pidfd_send_signal(process, signal.SIGKILL)
        except OSError:
            return False
        finally:
            os.close(process)
        return True

    def close(self) -> None:
        """Give the file back, and with it all locks."""
        if not self._closed:
            self._closed = True
            self._words.release()
            self._map.close()
            os.close(self._fd)

    def _record(self, node: int) -> tuple[int, int, int, int, int]:
        key, last, pid, by, start = _RECORD.unpack_from(self._map, _offset(node))
        return key, last, pid, by, start

    def label(self, node: int) -> str:
        """What a person reads: the name first, the number with it."""
        name = self._names.get(node)
        return f"node {name} ({node})" if name else f"node {node}"

    def _why_gone(self, node: int, key: int) -> str:
        _, last, _, by, _ = self._record(node)
        if last != key:
            return f"{self.label(node)} was started again, this is a former incarnation"
        if by == _NOBODY:
            return f"{self.label(node)} has given its reservation back"
        return f"{self.label(node)} was preempted by {self.label(by)}"


def _offset(node: int) -> int:
    return _HEADER.size + node * _RECORD.size


def _word(node: int) -> int:
    return _offset(node) // 8


def _lock(fd: int, kind: int, byte: int, *, wait: bool = False) -> bool:
    request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)
    except OSError as reason:
        if reason.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _start_time(pid: int) -> int:
    """Clock ticks from boot to the start of the process; tells two users of one pid apart."""
    stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    return int(stat.rpartition(")")[2].split()[19])


if sys.byteorder != "little":  # the table's words are the machine's
    raise ImportError("reservations need a little endian machine")
