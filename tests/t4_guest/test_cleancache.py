"""The cleancache client: names, counters, and a hypervisor that comes and goes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fs.hooks import Extent, FileKey
from guests.attachment import RETRY_SECONDS, Attachment
from guests.cleancache import (
    OWED_FILES_MAX,
    OWED_PAGES_PER_FILE_MAX,
    Cleancache,
    object_id,
)
from ipc.abi import INVALID_OID, OID_BYTES, CallFlag, Op
from ipc.channel import Channel
from ipc.errors import Disconnected, OperatorError
from ipc.local import Fault
from tests.t4_guest.worlds import (
    PAGE,
    LocalHypervisor,
    Time,
    push_out,
    read_file,
    running_kernel,
    write_file,
)

KEY = FileKey(12, 1)
DISCONNECTED = "tmem event=disconnected"


@pytest.fixture
def time() -> Time:
    """A clock that the test moves."""
    return Time()


@pytest.fixture
def cleancache(hypervisor: LocalHypervisor, time: Time) -> Cleancache:
    """A client, attached."""
    client = Cleancache(Attachment(hypervisor.connect, time.now_seconds))
    assert client.attach() is not None
    return client


def page(number: int) -> bytes:
    """A page of its own content."""
    return random.Random(number).randbytes(PAGE)


def put(client: Cleancache, key: FileKey, index: int, *numbers: int) -> None:
    """Offer neighbouring pages."""
    data = b"".join(page(number) for number in numbers)
    client.put_pages(key, index, len(numbers), memoryview(data))


def get(client: Cleancache, key: FileKey, index: int) -> bytes | None:
    """Take one page."""
    into = bytearray(PAGE)
    return bytes(into) if client.get_pages(key, index, 1, memoryview(into)) else None


def test_object_id_is_unique_by_number_and_generation() -> None:
    """24 bytes, never the invalid id."""
    keys = [FileKey(ino, generation) for ino in (1, 2, 2**32 - 1) for generation in (0, 1, 2**31)]
    ids = [object_id(key) for key in keys]

    assert len(set(ids)) == len(keys)
    assert {len(oid) for oid in ids} == {OID_BYTES}
    assert object_id(FileKey(2**64 - 1, 2**32 - 1)) != INVALID_OID


def test_extent_comes_back_page_by_page(cleancache: Cleancache) -> None:
    """The result says which pages are there; a get takes them out."""
    put(cleancache, KEY, 10, 1, 2, 3)
    into = bytearray(5 * PAGE)

    assert cleancache.get_pages(KEY, 9, 5, memoryview(into)) == 0b01110
    assert into[PAGE : 4 * PAGE] == page(1) + page(2) + page(3)
    assert get(cleancache, KEY, 10) is None, "a private ephemeral get is exclusive"


def test_nothing_is_asked_of_a_file_that_was_never_put(
    cleancache: Cleancache, hypervisor: LocalHypervisor
) -> None:
    """The pool is ours alone: what we have not put is not there."""
    other = FileKey(13, 1)
    put(cleancache, KEY, 0, 1, 2)
    calls = hypervisor.machine.clients["guest"].account.calls
    assert get(cleancache, other, 0) is None
    cleancache.flush_page(other, 0)
    cleancache.flush_inode(other)
    assert hypervisor.machine.clients["guest"].account.calls == calls
    assert (cleancache.absent, cleancache.failed_gets, cleancache.invalidates) == (1, 0, 0)

    put(cleancache, other, 7, 3)
    cleancache.flush_page(KEY, 0)
    assert (get(cleancache, other, 7), get(cleancache, KEY, 0)) == (page(3), None)
    cleancache.flush_inode(KEY)
    assert get(cleancache, KEY, 1) is None
    assert cleancache.absent == 2


def test_with_too_many_files_all_are_asked_for(
    cleancache: Cleancache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was forgotten may be there."""
    monkeypatch.setattr("guests.cleancache.PUT_FILES_MAX", 3)
    keys = [FileKey(ino, 1) for ino in range(20, 25)]
    for key in keys:
        put(cleancache, key, 0, key.ino)
    assert [get(cleancache, key, 0) for key in keys] == [page(key.ino) for key in keys]
    assert get(cleancache, KEY, 0) is None
    assert (cleancache.failed_gets, cleancache.absent) == (1, 0)


def test_counters_agree_with_the_hypervisor(image: Path) -> None:
    """Two independent counts, page for page, after real work in an arena that is too small."""
    hypervisor = LocalHypervisor(512 * 1024)
    rng = random.Random(5)
    with running_kernel(image, hypervisor) as kernel:
        for number in range(6):
            write_file(kernel, f"/f{number}", rng.randbytes(40 * PAGE))
        for _ in range(40):
            read_file(kernel, f"/f{rng.randrange(6)}")
            handle = kernel.vfs.open(f"/f{rng.randrange(6)}", os.O_WRONLY)
            kernel.vfs.pwrite(handle, b"!", rng.randrange(40 * PAGE))
            kernel.vfs.close(handle)
        kernel.vfs.unlink("/f0")
        kernel.vfs.truncate("/f1", 3 * PAGE)
        assert kernel.cleancache is not None
        counters = kernel.cleancache.counters()

        theirs = hypervisor.cleancache()
        assert {name: counters[name] for name in theirs} == theirs
        assert min(theirs.values()) > 0
        asked = theirs["succ_gets"] + theirs["failed_gets"] + kernel.cleancache.absent
        assert asked >= kernel.pages.counters.misses


def test_hits_save_disk_reads(image: Path, hypervisor: LocalHypervisor) -> None:
    """What tmem has is not read from the disk."""
    content = random.Random(6).randbytes(200 * PAGE)
    with running_kernel(image, hypervisor) as kernel:
        write_file(kernel, "/a", content)
        kernel.vfs.sync()
        read_file(kernel, "/a")
        before = kernel.device.read_pages

        assert read_file(kernel, "/a") == content
        # At most the indirect block.
        assert kernel.device.read_pages - before <= 1


def test_inode_number_used_again_never_hits_the_old_file(
    image: Path, hypervisor: LocalHypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its generation alone: the flush of the dead file is switched off here."""
    monkeypatch.setattr(Cleancache, "flush_inode", lambda *_: None)
    monkeypatch.setattr(Cleancache, "flush_page", lambda *_: None)
    with running_kernel(image, hypervisor) as kernel:
        write_file(kernel, "/push-out", bytes(300 * PAGE))
        write_file(kernel, "/old", b"o" * 10 * PAGE)
        old = kernel.vfs.stat("/old")
        push_out(kernel)
        kernel.vfs.unlink("/old")
        handle = kernel.vfs.open("/new", os.O_RDWR | os.O_CREAT)
        kernel.vfs.ftruncate(handle, 10 * PAGE)
        new = kernel.vfs.fstat(handle)

        assert new.st_ino == old.st_ino, "the number is used again at once"
        assert new.generation != old.generation
        assert kernel.vfs.read(handle, 10 * PAGE) == bytes(10 * PAGE)
        assert get(kernel.cleancache, FileKey(old.st_ino, old.generation), 3) is not None  # type: ignore[arg-type]


def test_removed_file_leaves_nothing_in_tmem(image: Path, hypervisor: LocalHypervisor) -> None:
    """Its object is flushed, which gives the memory back at once."""
    with running_kernel(image, hypervisor) as kernel:
        write_file(kernel, "/push-out", bytes(300 * PAGE))
        write_file(kernel, "/a", b"a" * 10 * PAGE)
        found = kernel.vfs.stat("/a")
        push_out(kernel)
        kernel.vfs.unlink("/a")

        assert kernel.cleancache is not None
        for index in range(10):
            assert get(kernel.cleancache, FileKey(found.st_ino, found.generation), index) is None


def test_unmount_gives_the_pool_back(image: Path, hypervisor: LocalHypervisor) -> None:
    """Nothing of the file system stays."""
    with running_kernel(image, hypervisor) as kernel:
        write_file(kernel, "/a", bytes(300 * PAGE))
        assert hypervisor.pages > 0

    assert hypervisor.pages == 0
    hypervisor.machine.store.reap(1 << 20)
    hypervisor.check()


def test_flush_while_dead_is_delivered_before_the_first_get(
    cleancache: Cleancache,
    hypervisor: LocalHypervisor,
    time: Time,
    expect_warning: Callable[[str], None],
) -> None:
    """A page that changed meanwhile never comes back; the others do."""
    expect_warning(DISCONNECTED)
    put(cleancache, KEY, 0, 1, 2, 3)
    put(cleancache, FileKey(13, 1), 0, 4)
    hypervisor.kill()
    cleancache.flush_page(KEY, 1)
    cleancache.flush_inode(FileKey(13, 1))
    hypervisor.start()
    time.seconds += RETRY_SECONDS

    assert get(cleancache, KEY, 1) is None
    assert get(cleancache, FileKey(13, 1), 0) is None
    assert get(cleancache, KEY, 0) == page(1)
    assert get(cleancache, KEY, 2) == page(3)


@pytest.mark.parametrize("fault", [Fault.LOSE_REQUEST, Fault.LOSE_REPLY])
def test_flush_of_unknown_fate_is_repeated(
    cleancache: Cleancache,
    hypervisor: LocalHypervisor,
    time: Time,
    expect_warning: Callable[[str], None],
    fault: Fault,
) -> None:
    """Also when the hypervisor dies again while the debt is being paid."""
    expect_warning(DISCONNECTED)
    put(cleancache, KEY, 0, 1, 2)
    faults = iter([fault, fault])
    hypervisor.draw_fault = lambda: next(faults, Fault.NONE)
    cleancache.flush_page(KEY, 0)
    time.seconds += RETRY_SECONDS
    assert cleancache.attach() is None, "died while it was told"
    time.seconds += RETRY_SECONDS

    assert get(cleancache, KEY, 0) is None
    assert get(cleancache, KEY, 1) == page(2)


def test_debts_are_bounded(
    cleancache: Cleancache,
    hypervisor: LocalHypervisor,
    time: Time,
    expect_warning: Callable[[str], None],
) -> None:
    """Many pages become the whole file, many files the whole pool."""
    expect_warning(DISCONNECTED)
    put(cleancache, KEY, 0, 1, 2)
    put(cleancache, FileKey(14, 1), 0, 3)
    hypervisor.kill()
    for index in range(1, OWED_PAGES_PER_FILE_MAX + 2):
        cleancache.flush_page(KEY, index)
    hypervisor.start()
    time.seconds += RETRY_SECONDS
    assert get(cleancache, KEY, 0) is None, "covered by the flush of the whole file"
    assert get(cleancache, FileKey(14, 1), 0) == page(3)

    files = [FileKey(ino, 1) for ino in range(1000, 1000 + OWED_FILES_MAX + 1)]
    for key in files:
        put(cleancache, key, 0, 4)
    put(cleancache, FileKey(14, 1), 0, 3)
    hypervisor.kill()
    for key in files:
        cleancache.flush_page(key, 0)
    assert cleancache.counters()["owed_files"] == 0
    hypervisor.start()
    time.seconds += RETRY_SECONDS
    assert get(cleancache, FileKey(14, 1), 0) is None, "covered by the flush of the pool"
    put(cleancache, KEY, 0, 5)
    assert get(cleancache, KEY, 0) == page(5)


def test_guest_goes_on_without_a_hypervisor_and_picks_it_up_again(
    image: Path,
    hypervisor: LocalHypervisor,
    time: Time,
    expect_warning: Callable[[str], None],
) -> None:
    """Slower, never wrong."""
    expect_warning(DISCONNECTED)
    content = random.Random(7).randbytes(150 * PAGE)
    with running_kernel(image, hypervisor, time=time) as kernel:
        assert kernel.cleancache is not None
        write_file(kernel, "/a", content)
        hypervisor.kill()
        assert read_file(kernel, "/a") == content
        assert not kernel.cleancache.attached
        hypervisor.start()
        assert read_file(kernel, "/a") == content
        assert not kernel.cleancache.attached, "not tried again yet"
        time.seconds += RETRY_SECONDS
        assert read_file(kernel, "/a") == content
        assert kernel.cleancache.attached
        assert kernel.cleancache.counters()["reattaches"] == 1


def test_attaching_is_tried_at_a_bounded_rate(
    time: Time, expect_warning: Callable[[str], None]
) -> None:
    """However many calls are made."""
    expect_warning("tmem event=not-attached why=nobody")
    tries = 0

    def connect() -> Channel:
        nonlocal tries
        tries += 1
        raise Disconnected("nobody")

    client = Cleancache(Attachment(connect, time.now_seconds))
    for _ in range(1000):
        time.seconds += RETRY_SECONDS / 100
        get(client, KEY, 0)

    assert 9 <= tries <= 11


def test_hypervisor_that_lost_its_memory_gets_a_new_pool(
    cleancache: Cleancache,
    hypervisor: LocalHypervisor,
    time: Time,
    expect_warning: Callable[[str], None],
) -> None:
    """Debts are void with the pool they are for."""
    expect_warning(DISCONNECTED)
    put(cleancache, KEY, 0, 1)
    hypervisor.kill(arena_lost=True)
    cleancache.flush_page(KEY, 0)
    hypervisor.start()
    time.seconds += RETRY_SECONDS

    assert get(cleancache, KEY, 0) is None
    assert cleancache.counters()["owed_files"] == 0
    put(cleancache, KEY, 0, 2)
    assert get(cleancache, KEY, 0) == page(2)


def test_put_of_unknown_fate_is_right_or_gone(
    cleancache: Cleancache,
    hypervisor: LocalHypervisor,
    time: Time,
    expect_warning: Callable[[str], None],
) -> None:
    """What it may have left is what the disk holds; a later change flushes it."""
    expect_warning(DISCONNECTED)
    faults = iter([Fault.LOSE_REPLY])
    hypervisor.draw_fault = lambda: next(faults, Fault.NONE)
    put(cleancache, KEY, 0, 1)
    time.seconds += RETRY_SECONDS

    assert get(cleancache, KEY, 0) == page(1)


def test_refusal_at_boot_is_the_operators_error(image: Path) -> None:
    """A wrong token is not worked around; the image stays clean."""

    class Refusing(LocalHypervisor):
        def connect(self) -> Channel:
            raise OperatorError("the hypervisor refused guest guest: wrong token")

    with pytest.raises(OperatorError, match="wrong token"), running_kernel(image, Refusing()):
        pass


def test_extents_of_several_files_go_in_one_call(
    hypervisor: LocalHypervisor, cleancache: Cleancache
) -> None:
    """Each page under its own name, with the hint of its extent."""
    other = FileKey(13, 5)
    extents = [Extent(KEY, 4, 2, True), Extent(KEY, 6, 1, False), Extent(other, 0, 3, False)]
    data = b"".join(page(number) for number in range(6))
    cleancache.put_extents(extents, memoryview(data))

    account = hypervisor.machine.clients["guest"].account
    assert account.put.calls == 0
    assert account.operations[Op.PUT_BATCH].calls == 1
    assert hypervisor.cleancache()["puts"] == cleancache.puts == 6
    assert hypervisor.hints() == {
        (object_id(KEY), 4): CallFlag.ACTIVE,
        (object_id(KEY), 5): CallFlag.ACTIVE,
        (object_id(KEY), 6): 0,
        (object_id(other), 0): 0,
        (object_id(other), 1): 0,
        (object_id(other), 2): 0,
    }
    assert [get(cleancache, KEY, index) for index in (4, 5, 6)] == [page(n) for n in range(3)]
    assert [get(cleancache, other, index) for index in range(3)] == [page(n) for n in range(3, 6)]
    hypervisor.check()


def test_pages_that_were_active_are_offered_as_such(
    image: Path, hypervisor: LocalHypervisor
) -> None:
    """Active is what was used twice while it was resident, and came down again since."""
    with running_kernel(image, hypervisor) as kernel:
        write_file(kernel, "/once", random.Random(1).randbytes(20 * PAGE))
        write_file(kernel, "/often", random.Random(2).randbytes(20 * PAGE))
        kernel.vfs.sync()
        # What was written and read to the end is out, what is read now is in.
        write_file(kernel, "/push-out", bytes(300 * PAGE))
        push_out(kernel)
        read_file(kernel, "/once")
        for _ in range(3):
            read_file(kernel, "/often")
        once, often = (kernel.vfs.stat(path).st_ino for path in ("/once", "/often"))
        push_out(kernel)
        hints = hypervisor.hints()

        def of_file(ino: int) -> set[int]:
            return {
                hint for (oid, _), hint in hints.items() if oid[:8] == ino.to_bytes(8, "little")
            }

        assert of_file(once) == {0}
        assert of_file(often) == {CallFlag.ACTIVE}
