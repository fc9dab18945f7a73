"""The client for ordinary programs, against a real hypervisor process."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.api import NoSuchPool, NotAllowed, PoolRefused, Tmem
from ipc.abi import (
    ANY_UUID,
    INVALID_OID,
    PAGE_BYTES,
    UUID_BYTES,
    Priority,
    Reason,
    Status,
    oid_from_int,
)
from ipc.attach import CONTROL_SOCKET
from ipc.errors import Disconnected, OperatorError
from tests.support.hypervisors import RunningHypervisor, running_hypervisor
from tools.control import ask

pytestmark = pytest.mark.cluster

A, B, C = (random.Random(seed).randbytes(PAGE_BYTES) for seed in range(3))


@pytest.fixture
def hypervisor(tmp_path: Path, cluster_name: str) -> Iterator[RunningHypervisor]:
    """A process with an arena of 4 MiB."""
    with running_hypervisor(cluster_name, tmp_path) as running:
        yield running
        running.stop()


@pytest.fixture
def tmem(hypervisor: RunningHypervisor) -> Iterator[Tmem]:
    """Attached as `worker`."""
    token = hypervisor.enrol("worker")
    with Tmem.connect(hypervisor.run_directory, "worker", token) as client:
        yield client


def test_ephemeral_page_comes_back_once(tmem: Tmem) -> None:
    """A get takes it out."""
    pool = tmem.pool()

    assert pool.put(7, 0, A)
    assert pool.get(7, 0) == A
    assert pool.get(7, 0) is None


def test_persistent_page_stays_until_it_is_flushed(tmem: Tmem) -> None:
    """And a second put replaces it."""
    pool = tmem.pool(persist=True)

    assert pool.put(7, 0, A)
    assert pool.put(7, 0, B)
    assert pool.get(7, 0) == pool.get(7, 0) == B
    assert not pool.report(7, 0, A)
    assert pool.report(7, 0, B)
    pool.flush_page(7, 0)
    pool.flush_page(7, 0)
    assert not pool.report(7, 0, B)
    assert pool.get(7, 0) is None


def test_extent_of_any_length(tmem: Tmem) -> None:
    """More pages than one call moves, and gaps."""
    pool = tmem.pool(persist=True)

    assert pool.put_extent(1, 10, (A + B + C) * 50) == [True] * 150
    pool.flush_page(1, 11)
    assert pool.get_extent(1, 9, 4) == [None, A, None, C]
    assert pool.get_extent(1, 10, 150)[3:] == [A, B, C] * 49
    assert pool.flush_object(1) == 149


def test_pools_do_not_see_one_another(tmem: Tmem) -> None:
    """One handle, two pools."""
    first, second = tmem.pool(persist=True), tmem.pool(persist=True)
    first.put(1, 1, A)

    assert second.get(1, 1) is None
    first.destroy()
    first.destroy()
    with pytest.raises(NoSuchPool):
        first.get(1, 1)


def test_scattered_batches(tmem: Tmem) -> None:
    """The hypercalls themselves: unrelated handles in one call."""
    pool, calls = tmem.pool(persist=True).number, tmem.calls
    window = calls.channel.window
    entries = [(pool, 1000 * at, at, 0, oid_from_int(at), 0) for at in range(3)]
    for slot, page in enumerate((A, B, C)):
        window.slot(slot)[:] = page
    assert calls.put_batch(entries).map == 0b111
    window.slots[:] = bytes(len(window.slots))

    assert calls.get_batch(entries[1:]).map == 0b11
    assert bytes(window.slot(1, 2)) == B + C
    flushes = [(pool, 0, 0, 0, oid_from_int(0), 0)]
    assert calls.flush_batch(flushes).map == 1
    assert calls.get_batch(entries).map == 0b110
    assert calls.version().status == Status.DONE


def test_senseless_arguments_are_value_errors(tmem: Tmem) -> None:
    """Before anything is sent."""
    pool = tmem.pool()

    for oid in (-1, int.from_bytes(INVALID_OID, "little"), 1 << 192):
        with pytest.raises(ValueError, match="object id"):
            pool.get(oid, 0)
    for index in (-1, 1 << 32):
        with pytest.raises(ValueError, match="pages"):
            pool.put(1, index, A)
    for data in (b"", A[:-1]):
        with pytest.raises(ValueError, match="whole pages"):
            pool.put(1, 0, data)


def test_close_gives_the_pools_back(hypervisor: RunningHypervisor) -> None:
    """The hypervisor knows the program no more."""
    token = hypervisor.enrol("worker")
    with Tmem.connect(hypervisor.run_directory, "worker", token) as tmem:
        tmem.pool(persist=True).put_extent(1, 0, A * 100)
        assert hypervisor.ask("stats")["guests"]["worker"]["persistent_pages"] == 100

    assert hypervisor.ask("stats")["guests"] == {}


def test_persistent_pages_outlive_the_hypervisor(hypervisor: RunningHypervisor, tmem: Tmem) -> None:
    """SIGKILL, start again, reconnect: nothing is lost."""
    pool = tmem.pool(persist=True)
    pool.put_extent(1, 0, A + B + C)
    hypervisor.kill()
    with pytest.raises(Disconnected):
        pool.get(1, 0)
    hypervisor.start()

    assert tmem.reconnect()
    assert pool.get_extent(1, 0, 3) == [A, B, C]


def test_wrong_token_is_refused(hypervisor: RunningHypervisor, tmem: Tmem) -> None:
    """With the reason."""
    with pytest.raises(OperatorError, match="refused guest worker"):
        Tmem.connect(hypervisor.run_directory, "worker", os.urandom(32))


# --- shared pools and hints

UUID = b"u" * UUID_BYTES


def allow(hypervisor: RunningHypervisor, guest: str, role: str | None) -> None:
    """The administrator lets a guest into the pool, or no longer."""
    control = hypervisor.run_directory / CONTROL_SOCKET
    action = "deny" if role is None else "allow"
    question = {"verb": "auth", "action": action, "guest": guest, "uuid": UUID.hex()}
    answer = ask(control, question if role is None else {**question, "role": role})
    assert "grants" in answer, answer


def test_shared_pool_is_for_those_who_are_allowed(
    hypervisor: RunningHypervisor, tmem: Tmem
) -> None:
    """Who is not is told why; a reader may get and no more; a grant can be taken back."""
    with pytest.raises(PoolRefused, match="shared_denied: the administrator") as refusal:
        tmem.pool(shared_uuid=UUID)
    assert refusal.value.reason is Reason.SHARED_DENIED
    with pytest.raises(PoolRefused, match="shared_needs_uuid"):
        tmem.pool(shared_uuid=ANY_UUID)
    with pytest.raises(ValueError, match="16 bytes"):
        tmem.pool(shared_uuid=b"short")

    allow(hypervisor, "worker", "writer")
    allow(hypervisor, "other", "reader")
    mine = tmem.pool(shared_uuid=UUID, persist=True)
    assert (mine.shared, mine.joined, mine.reader) == (True, False, False)
    assert mine.put(1, 1, A)
    token = hypervisor.enrol("other")
    with Tmem.connect(hypervisor.run_directory, "other", token) as other:
        with pytest.raises(PoolRefused, match="kind_differs"):
            other.pool(shared_uuid=UUID)
        theirs = other.pool(shared_uuid=UUID, persist=True)
        assert (theirs.shared, theirs.joined, theirs.reader) == (True, True, True)
        assert theirs.get(1, 1) == A
        with pytest.raises(NotAllowed, match="not_writer") as no:
            theirs.put(1, 1, B)
        assert no.value.reason is Reason.NOT_WRITER
        allow(hypervisor, "other", None)
        with pytest.raises(NotAllowed, match="shared_denied"):
            theirs.get(1, 1)
    assert mine.get(1, 1) == A


def test_get_can_leave_the_page(tmem: Tmem) -> None:
    """With keep; hints change nothing that a program sees."""
    pool = tmem.pool(priority=Priority.HIGH)

    assert pool.put(7, 0, A, priority=Priority.LOW, active=True)
    assert pool.put_extent(7, 1, B + C, priority=Priority.HIGH) == [True, True]
    assert pool.get(7, 0, keep=True) == A
    assert pool.get_extent(7, 0, 3, keep=True) == [A, B, C]
    assert pool.get(7, 0) == A
    assert pool.get(7, 0, keep=True) is None
