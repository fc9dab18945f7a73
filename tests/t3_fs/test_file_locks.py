"""The same random locks on our file system and on a file of the host: same answers.

Linux's open file description locks belong to a handle, so one process can hold several that are in
each other's way, and the host's kernel can be asked without a second process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import struct
from pathlib import Path

import pytest

from fs.filelocks import END, RANGES_MAX, handle_owner
from fs.vfs import Vfs
from tests.t3_fs.images import Image

STEPS = 1500
HANDLES = 4
F_OFD_GETLK, F_OFD_SETLK = 36, 37
"""From Linux's `fcntl.h`; Python 3.11 does not name them."""
FLOCK = struct.Struct("@hhqqi4x")
KINDS = (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK)
FLAGS = (os.O_RDWR, os.O_RDWR, os.O_RDWR, os.O_RDONLY)


class Host:
    """The kernel's locks, under the names of `Vfs`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, _path: str, flags: int) -> int:
        return os.open(self.path, flags | os.O_CREAT)

    def close(self, number: int) -> None:
        os.close(number)

    def flock(self, number: int, operation: int) -> None:
        fcntl.flock(number, operation | fcntl.LOCK_NB)

    def lock_range(self, number: int, kind: int, start: int, length: int) -> None:
        fcntl.fcntl(number, F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, start, length, 0))

    def range_in_the_way(self, number: int, kind: int, start: int, length: int) -> object:
        asked = FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
        found = FLOCK.unpack(fcntl.fcntl(number, F_OFD_GETLK, asked))
        if found[0] == fcntl.F_UNLCK:
            return None
        return found[2], found[2] + found[3] if found[3] else END, found[0] == fcntl.F_WRLCK


class Ours:
    """The same of a `Vfs`."""

    def __init__(self, vfs: Vfs) -> None:
        self.vfs = vfs
        self.open, self.close = vfs.open, vfs.close
        self.flock, self.lock_range = vfs.flock, vfs.lock_range

    def range_in_the_way(self, number: int, kind: int, start: int, length: int) -> object:
        found = self.vfs.range_in_the_way(number, kind, start, length)
        return None if found is None else found[:3]


def answer(locks: Host | Ours, name: str, *arguments: int) -> object:
    """What a call returns, or the name of its errno."""
    try:
        return getattr(locks, name)(*arguments)
    except OSError as reason:
        return errno.errorcode[reason.errno or 0]


def is_one_of_several(mine: object, theirs: object, locks: Vfs) -> bool:
    """Of several ranges in the way each side may name the one it likes."""
    found = [(one.start, one.end, one.exclusive) for _, one in locks.file_locks.ranges()]
    return mine is not None and theirs in found and mine in found


@pytest.mark.parametrize("seed", range(4))
def test_locks_as_linux_has_them(image: Image, tmp_path: Path, seed: int) -> None:
    """Results, errno, and what is locked afterwards."""
    rng = random.Random(seed)
    vfs = image.mount()
    vfs.close(vfs.open("/f", os.O_CREAT | os.O_RDWR))
    ours, host = Ours(vfs), Host(tmp_path / "host")
    pairs = [(ours.open("/f", flags), host.open("", flags)) for flags in FLAGS]
    answers: set[object] = set()
    for step in range(STEPS):
        place = rng.randrange(HANDLES)
        mine, its = pairs[place]
        where = f"seed {seed} step {step} handle {place}"
        if rng.random() < 0.02:
            ours.close(mine)
            host.close(its)
            pairs[place] = ours.open("/f", FLAGS[place]), host.open("", FLAGS[place])
        elif rng.random() < 0.2:
            operation = rng.choice((fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN))
            got = answer(ours, "flock", mine, operation)
            assert got == answer(host, "flock", its, operation), f"{where} flock {operation}"
            answers.add(got)
        else:
            start = rng.randrange(64)
            length = rng.choice((0, 1, rng.randrange(1, 30), rng.randrange(-40, 0)))
            kind = rng.choice(KINDS)
            what = (kind, start, length)
            if kind != fcntl.F_UNLCK and rng.random() < 0.3:
                got = answer(ours, "range_in_the_way", mine, *what)
                expected = answer(host, "range_in_the_way", its, *what)
                if not is_one_of_several(got, expected, vfs):
                    assert got == expected, f"{where} {what}"
            else:
                got = answer(ours, "lock_range", mine, *what)
                assert got == answer(host, "lock_range", its, *what), f"{where} {what}"
                answers.add(got)
    assert {None, "EAGAIN", "EINVAL", "EBADF"} <= answers
    for _, its in pairs:
        host.close(its)


def test_what_a_process_has_by_several_handles(vfs: Vfs) -> None:
    """Classic locks belong to the process: any handle may change them, all go at once."""
    first, second = (vfs.open("/f", os.O_RDWR | os.O_CREAT) for _ in range(2))
    vfs.lock_range(first, fcntl.F_WRLCK, 0, 10, owner=7)
    vfs.lock_range(second, fcntl.F_WRLCK, 5, 10, owner=7)
    assert vfs.range_in_the_way(second, fcntl.F_RDLCK, 0, 0, owner=7) is None
    assert vfs.range_in_the_way(first, fcntl.F_RDLCK, 0, 0) == (0, 15, True, 7, None)
    vfs.close(second)
    with pytest.raises(BlockingIOError):
        vfs.lock_range(first, fcntl.F_RDLCK, 14, 1, owner=8)
    vfs.unlock_owner(first, 7)
    vfs.lock_range(first, fcntl.F_RDLCK, 14, 1, owner=8)
    assert [one for _, one in vfs.file_locks.ranges()] == [(14, 15, False, 8, None)]
    vfs.close(first)
    assert vfs.file_locks.ranges() == []


def test_a_conversion_that_fails_loses_the_lock(vfs: Vfs) -> None:
    """As with flock(2): what the handle had goes first."""
    first, second = (vfs.open("/f", os.O_RDWR | os.O_CREAT) for _ in range(2))
    vfs.flock(first, fcntl.LOCK_SH)
    vfs.flock(second, fcntl.LOCK_SH)
    with pytest.raises(BlockingIOError):
        vfs.flock(first, fcntl.LOCK_EX)
    vfs.flock(second, fcntl.LOCK_EX)
    assert [row[1:] for row in vfs.file_locks.whole_files()] == [(second, True)]
    vfs.close(second)
    assert vfs.file_locks.whole_files() == []


def test_the_number_of_ranges_is_bounded(vfs: Vfs) -> None:
    """ENOLCK, and everything stays as it was; unlocking is possible all the time."""
    handle = vfs.open("/f", os.O_RDWR | os.O_CREAT)
    for number in range(RANGES_MAX):
        vfs.lock_range(handle, fcntl.F_WRLCK, 2 * number, 1)
    with pytest.raises(OSError, match="locked ranges") as failed:
        vfs.lock_range(handle, fcntl.F_WRLCK, 2 * RANGES_MAX, 1)
    assert failed.value.errno == errno.ENOLCK
    assert len(vfs.file_locks.ranges()) == RANGES_MAX
    vfs.lock_range(handle, fcntl.F_UNLCK, 0, 0)
    assert vfs.file_locks.ranges() == []
    vfs.lock_range(handle, fcntl.F_WRLCK, 0, 0)
    assert vfs.file_locks.ranges()[0][1] == (0, END, True, handle_owner(handle), None)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (("flock", 3, 99), errno.EINVAL),
        (("flock", 99, fcntl.LOCK_SH), errno.EBADF),
        (("lock_range", 3, 7, 0, 0), errno.EINVAL),
        (("lock_range", 3, fcntl.F_RDLCK, -1, 0), errno.EINVAL),
        (("lock_range", 3, fcntl.F_RDLCK, END - 1, 2), errno.EOVERFLOW),
        (("range_in_the_way", 3, fcntl.F_UNLCK, 0, 0), errno.EINVAL),
    ],
)
def test_wrong_use(vfs: Vfs, call: tuple[str, int], expected: int) -> None:
    """The errno says what was wrong."""
    assert vfs.open("/f", os.O_RDWR | os.O_CREAT) == 3
    name, *arguments = call
    with pytest.raises(OSError, match=r".") as failed:
        getattr(vfs, name)(*arguments)
    assert failed.value.errno == expected
