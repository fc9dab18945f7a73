"""The fuzz targets with a fixed set of inputs; `make fuzz` goes on from where this ends."""

from __future__ import annotations

import hmac
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervisor.machine import Machine
from ipc.abi import REPLY
from ipc.mesh import frames, handshake
from ipc.ring import RingPair
from tests.fuzz.mesh import fuzz_mesh
from tests.fuzz.rings import fuzz_ring
from tests.fuzz.targets import LENGTH_MAX, Finding, fuzz_machine, fuzz_wire


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
