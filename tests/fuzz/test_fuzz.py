"""The fuzz targets with a fixed set of inputs; `make fuzz` goes on from where this ends.

An input of the corpus that fails is named by its id: `python -m tests.fuzz TARGET --replay ID`.
"""

from __future__ import annotations

import hmac
import logging
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.administration import Administration
from hypervisor.arena import FRAMES_MIN, layout, private_arena
from hypervisor.beside import Beside
from hypervisor.invariants import check
from hypervisor.machine import Machine
from ipc.abi import PAGE_BYTES, REPLY, REQUEST, Op, oid_from_int
from ipc.codec import encode
from ipc.mesh import frames, handshake
from ipc.ring import RingPair
from tests.fuzz import corpus
from tests.fuzz.machines import ASKED, GUESTS, SENSIBLE, VALUES, World, fuzz_machine
from tests.fuzz.mesh import fuzz_mesh
from tests.fuzz.reading import Finding
from tests.fuzz.rings import fuzz_ring
from tests.fuzz.targets import LENGTH_MAX, TARGETS, fuzz_wire


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """What a peer does wrong is told in logs; here that is all that ever happens."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_what_is_kept_is_survived(target: str) -> None:
    """Inputs that reach all that fuzzing has reached so far."""
    inputs = corpus.kept(target)
    assert inputs
    for data in inputs:
        try:
            TARGETS[target](data)
        except Exception as finding:
            finding.add_note(f"python -m tests.fuzz {target} --replay {corpus.identity(data)}")
            raise


def test_what_is_kept_is_small_and_there_once() -> None:
    """A few hundred KiB of text at most."""
    assert {path.stem for path in corpus.DIRECTORY.iterdir()} == set(TARGETS)
    for target in TARGETS:
        inputs = corpus.kept(target)
        assert len(set(inputs)) == len(inputs)
        assert max(map(len, inputs)) <= LENGTH_MAX[target]
        assert (corpus.DIRECTORY / f"{target}.txt").stat().st_size <= corpus.BYTES_MAX


@pytest.mark.parametrize(("target", "place", "defect"), [
    ("attach", "ipc.attach.is_enrolled", lambda *_: True),
    ("attach", "hypervisor.sessions.Sessions._guest_died", lambda *_: None),
    ("control", "hypervisor.control.encode", lambda record: encode(record)[:-1]),
    ("control", "tools.answers._check", lambda *_: None),
    ("locks", "fs.dlm.manager._newest_death", lambda _message: 0),
    (
        "cluster",
        "fs.cluster.participant.Participant._on_view",
        lambda self, _sender, message: self._install(message.view),
    ),
    ("ranges", "guests.rangequeries.END", 1 << 64),
    ("ext", "fs.ext.super.Superblock._check_geometry", lambda *_: None),
    ("ocfs2", "fs.ocfs2.extents.Extents._checked", lambda _self, _inode, record: record),
    ("journal", "fs.jbd2.area.Area.is_home", lambda *_: True),
    ("journal", "fs.jbd2.layout.Layout.revoked", lambda *_: []),
    ("swap", "guests.swapheader._bad_pages", lambda page, *_: tuple(page[1536:1560])),
])  # fmt: skip
def test_a_target_notices_a_check_that_is_left_out(
    monkeypatch: pytest.MonkeyPatch, target: str, place: str, defect: object
) -> None:
    """A target that can't fail would prove nothing."""
    monkeypatch.setattr(place, defect)

    def campaign() -> None:
        for data in corpus.kept(target):
            TARGETS[target](data)
        for seed in range(100):
            length = LENGTH_MAX[target] // (1 + seed % 4)
            TARGETS[target](random.Random(seed).randbytes(length))

    with pytest.raises(Exception):  # noqa: B017, PT011
        campaign()


@settings(derandomize=True, database=None, max_examples=500, deadline=None)
@given(st.binary(max_size=LENGTH_MAX["wire"]))
def test_parsers_raise_what_they_declare(data: bytes) -> None:
    """And nothing else, for any bytes."""
    fuzz_wire(data)


@settings(derandomize=True, database=None, max_examples=500, deadline=None)
@given(st.binary(max_size=LENGTH_MAX["mesh"]))
def test_an_end_of_a_mesh_survives_any_bytes(data: bytes) -> None:
    """Small inputs, which shrink well."""
    fuzz_mesh(data)


@pytest.mark.parametrize("kind", range(5))
def test_an_end_of_a_mesh_survives_long_random_bytes(kind: int) -> None:
    """Each of the target's halves some hundred times."""
    for seed in range(300):
        fuzz_mesh(bytes([kind]) + random.Random(seed).randbytes(LENGTH_MAX["mesh"] - 1))
        fuzz_mesh(bytes([kind]) + random.Random(seed).randbytes(5))


@pytest.mark.parametrize("module", [frames, handshake])
def test_the_mesh_target_notices_proofs_and_seals_that_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, module: object
) -> None:
    """A target that can't fail would prove nothing."""
    monkeypatch.setattr(module, "hmac", Careless)

    def campaign() -> None:
        for seed in range(300):
            fuzz_mesh(b"\3" + random.Random(seed).randbytes(3))
            fuzz_mesh(b"\4" + random.Random(seed).randbytes(100))

    with pytest.raises(AssertionError, match=r"went through|never sealed"):
        campaign()


class Careless:
    """hmac that finds everything equal."""

    digest = staticmethod(hmac.digest)

    @staticmethod
    def compare_digest(_left: bytes, _right: bytes) -> bool:
        return True


@settings(derandomize=True, database=None, max_examples=300, deadline=None)
@given(st.binary(max_size=LENGTH_MAX["ring"]))
def test_a_ring_survives_any_bytes(data: bytes) -> None:
    """Small inputs, which shrink well."""
    fuzz_ring(data)


@pytest.mark.parametrize("seed", range(40))
def test_a_ring_survives_long_random_sequences(seed: int) -> None:
    """Some hundred steps each."""
    fuzz_ring(random.Random(seed).randbytes(LENGTH_MAX["ring"]))


def test_the_ring_target_notices_a_call_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken and not answered: `completed` stays behind."""
    monkeypatch.setattr(RingPair, "send", lambda *_: True)

    with pytest.raises(AssertionError):
        fuzz_ring(b"")


@settings(derandomize=True, database=None, max_examples=150, deadline=None)
@given(st.binary(max_size=LENGTH_MAX["machine"]))
def test_a_machine_survives_any_bytes(data: bytes) -> None:
    """Small inputs, which shrink well."""
    fuzz_machine(data)


@pytest.mark.parametrize("seed", range(40))
def test_a_machine_survives_long_random_sequences(seed: int) -> None:
    """Some 400 steps each, so the arena is full most of the time."""
    fuzz_machine(random.Random(seed).randbytes(LENGTH_MAX["machine"]))


@pytest.mark.parametrize("asked", ASKED, ids=" ".join)
def test_the_administrator_is_answered_whatever_one_value_is(asked: tuple[str, ...]) -> None:
    """Each key of each verb; with an object id of thousands of digits the hypervisor ended."""
    verb, *keys = asked
    sensible = {"verb": verb} | {key: SENSIBLE[key][0] for key in keys}
    machine = Machine(private_arena(layout(FRAMES_MIN).end))
    machine.attach("g0", 1, 1, 0)
    for key in (*keys, "nonsense"):
        for value in VALUES:
            assert encode(Administration(machine).answer(sensible | {key: value}))
    check(machine)


def test_the_oracle_notices_a_wrong_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that can't fail would prove nothing."""
    right = Machine.execute

    def wrong(self: Machine, *arguments: object) -> bytes:
        fields = REPLY.unpack(right(self, *arguments))  # type: ignore[arg-type]
        return REPLY.pack(*fields[:5], fields[5] | 1 << 63, fields[6])

    monkeypatch.setattr(Machine, "execute", wrong)

    with pytest.raises(Finding, match="map has bits beyond count"):
        fuzz_machine(random.Random(1).randbytes(200))


def test_the_oracle_notices_foreign_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of another guest in a slot is enough."""
    right = Machine.execute

    def leaky(self: Machine, client: object, message: bytes, window: object) -> bytes:
        window.slots[-1] = 77  # type: ignore[attr-defined]
        return right(self, client, message, window)  # type: ignore[arg-type]

    monkeypatch.setattr(Machine, "execute", leaky)

    with pytest.raises(Finding, match="another guest's bytes"):
        fuzz_machine(random.Random(1).randbytes(200))


def test_the_oracle_notices_a_page_in_the_wrong_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that the guest may have."""
    right = Machine.execute

    def misplaced(self: Machine, client: object, message: bytes, window: object) -> bytes:
        window.slots[-PAGE_BYTES:] = window.slots[:PAGE_BYTES]  # type: ignore[attr-defined]
        return right(self, client, message, window)  # type: ignore[arg-type]

    monkeypatch.setattr(Machine, "execute", misplaced)

    with pytest.raises(Finding, match="was not to fill"):
        fuzz_machine(random.Random(1).randbytes(200))


def test_the_oracle_notices_a_page_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory rots in the target, and with checksums nobody may get what has become of it."""

    def put_rot_get() -> None:
        world = World(bytes((0, 128 | 4)))
        put, get = (
            REQUEST.pack(1, op, 0, 1, 1, 0, oid_from_int(1), slot, 0, 0)
            for op, slot in ((Op.PUT_PAGE, 1), (Op.GET_PAGE, 5))
        )
        world.call(GUESTS[0], put)
        world.rot(0)
        world.call(GUESTS[0], get)

    put_rot_get()
    monkeypatch.setattr(Beside, "is_right", lambda *_: True)

    with pytest.raises(Finding, match="another guest's bytes"):
        put_rot_get()
