"""The ring: conformance with either side awake or asleep; a guest that backs off."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import posix_ipc
import pytest

from ipc import ring
from ipc.abi import Op
from ipc.limits import (
    BACK_OFF_CALLS_MAX,
    BACK_OFF_CALLS_MIN,
    SLOW_YIELD_NS,
)
from ipc.mqueue import KICK, QueueChannel
from ipc.ring import BackOff, RingChannel, memory_order_suffices
from tests.t0_ipc.conformance import ask, request
from tests.t0_ipc.processes import EchoProcess, ProcessTransport

pytestmark = pytest.mark.skipif(
    not memory_order_suffices(), reason="the ring in Python needs x86-64"
)


class TestRing(ProcessTransport):
    """Both sides look for a while before they sleep."""

    ring = True

    def test_it_is_one(self, echo: EchoProcess) -> None:
        """Granted to who asks, and to nobody else."""
        with echo.opened(ring=True) as ours, echo.opened(ring=False) as other:
            assert type(ours) is RingChannel
            assert type(other) is QueueChannel
            for sequence in range(50):
                for channel in (ours, other):
                    message = request(sequence, Op.FLUSH_PAGE, token=sequence)
                    assert ask(channel, message).value == sequence


class TestRingWhoseServerSleeps(ProcessTransport):
    """Each call is rung for."""

    ring = True
    watches = False


class TestRingWhoseGuestSleeps(ProcessTransport):
    """Each reply is rung for."""

    ring = True

    @pytest.fixture(autouse=True)
    def guest_yields_never(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It goes to sleep at once."""
        monkeypatch.setattr(ring, "_YIELDS", range(0))


class TestRingWhereBothSleep(TestRingWhoseGuestSleeps):
    """Words and bells only."""

    watches = False


class TestRingWhoseGuestBacksOff(ProcessTransport):
    """Calls go through the ring and the queues by turns, however the earlier ones ended."""

    ring = True

    @contextmanager
    def opened(self, echo: EchoProcess) -> Iterator[QueueChannel]:
        """A channel that backs off for a random number of calls now and then."""
        with super().opened(echo) as channel:
            assert isinstance(channel, RingChannel)
            channel.__class__ = MoodyChannel
            channel._back_off = MoodyBackOff()
            yield channel


class MoodyChannel(RingChannel):
    """Asks before each call whether it can be made in the block."""

    @property
    def _ready(self) -> bool:
        return False

    @_ready.setter
    def _ready(self, _: bool) -> None:
        pass


class MoodyBackOff(BackOff):
    """Every other time that it is asked there are calls left to do without."""

    choose = random.Random(1)

    @property
    def left(self) -> int:
        return self.choose.randrange(2)

    @left.setter
    def left(self, _: int) -> None:
        pass


def test_nobody_sleeps_through_a_bell(
    tmp_path: Path, cluster_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either side goes to sleep at random moments; a lost wake-up would hang for ever."""
    monkeypatch.setattr(ring, "PATIENCE_SECONDS", 600.0)
    server = EchoProcess(tmp_path, cluster_name)
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    try:
        with server.opened(ring=True) as channel:
            assert isinstance(channel, RingChannel)
            for sequence in range(20_000):
                monkeypatch.setattr(ring, "_YIELDS", range(choose.choice((0, 0, 1, 2, 50))))
                channel._back_off.left = left = choose.choice((0, 0, 0, 1))
                channel._ready = channel._ready and not left
                for _ in range(choose.choice((0, 0, 0, 10, 100, 1000))):
                    pass
                assert ask(channel, request(sequence, Op.FLUSH_PAGE)).sequence == sequence
    finally:
        server.close()


def test_an_odd_message_travels_as_it_is(tmp_path: Path, cluster_name: str) -> None:
    """Through the queue, whatever came before it and comes after."""
    server = EchoProcess(tmp_path, cluster_name)
    try:
        with server.opened(ring=True) as channel:
            for length in (4, 63, 64, 64, 5, 64):
                message = b"K\x08\x09\x0a".ljust(64, b"\0")[:length]
                assert ask(channel, message).sequence == int.from_bytes(message[:4], "little")
    finally:
        server.close()


def test_a_bell_that_finds_the_queue_full_is_not_needed(tmp_path: Path, cluster_name: str) -> None:
    """What fills the queue wakes the hypervisor as well."""
    server = EchoProcess(tmp_path, cluster_name, watches=False)
    try:
        with server.opened(ring=True) as channel:
            for _ in range(20):
                with contextlib.suppress(posix_ipc.BusyError):
                    for _ in range(10_000):
                        channel._requests.send(KICK, 0)
                assert ask(channel, request(1, Op.FLUSH_PAGE)).sequence == 1
    finally:
        server.close()


@pytest.mark.parametrize(
    ("machine", "suffices"),
    [("x86_64", True), ("aarch64", False), ("riscv64", False), ("ppc64le", False), ("i686", False)],
)
def test_the_machines_that_keep_the_order(machine: str, suffices: bool) -> None:
    """Only one of them does without fences that Python does not have."""
    assert memory_order_suffices(machine) == suffices


def test_each_slow_yield_doubles_the_calls_without_one() -> None:
    """From 32 to 4096, and no further."""
    back_off = BackOff()
    lengths = []
    for number in range(10):
        back_off.slow(number)
        lengths.append(back_off.left)
    assert lengths == [32, 64, 128, 256, 512, 1024, 2048, 4096, 4096, 4096]


def test_many_good_calls_forget_the_slow_ones() -> None:
    """As many as the longest back-off; one fewer does not."""
    for good, expected in (
        (BACK_OFF_CALLS_MAX - 1, 4 * BACK_OFF_CALLS_MIN),
        (BACK_OFF_CALLS_MAX, BACK_OFF_CALLS_MIN),
    ):
        back_off = BackOff()
        back_off.slow(10)
        back_off.slow(20)
        back_off.slow(20 + good)
        assert back_off.left == expected


def test_a_guest_with_a_slow_yield_does_without(
    tmp_path: Path, cluster_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the calls that the back-off says; their replies come all the same."""
    yields: list[int] = []
    clock = iter(range(0, 1 << 60, SLOW_YIELD_NS + 1))
    server = EchoProcess(tmp_path, cluster_name)
    try:
        with server.opened(ring=True) as channel:
            monkeypatch.setattr(ring, "_yield", lambda: yields.append(1))
            monkeypatch.setattr(ring, "now_ns", lambda: next(clock))
            for sequence in range(1 + BACK_OFF_CALLS_MIN + 1 + 2 * BACK_OFF_CALLS_MIN + 1):
                assert ask(channel, request(sequence, Op.FLUSH_PAGE)).sequence == sequence
    finally:
        server.close()
    assert len(yields) == 3


def test_in_quiet_times_one_call_in_eight_is_timed(
    tmp_path: Path, cluster_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is enough to find out that they are over."""
    server = EchoProcess(tmp_path, cluster_name)
    try:
        with server.opened(ring=True) as channel:
            assert isinstance(channel, RingChannel)
            ours, theirs = channel.window.call_words, channel.window.completion_words

            def yield_until_answered() -> None:
                while theirs[0] != ours[0]:
                    os.sched_yield()

            readings: list[int] = []
            step_ns = 0

            def read_clock() -> int:
                readings.append(ours[0])
                return len(readings) * step_ns

            monkeypatch.setattr(ring, "_yield", yield_until_answered)
            monkeypatch.setattr(ring, "now_ns", read_clock)
            channel._back_off.calm_from = 5
            for sequence in range(24):
                ask(channel, request(sequence, Op.FLUSH_PAGE))
            assert sorted(set(readings)) == [1, 2, 3, 4, 8, 16, 24]
            step_ns = SLOW_YIELD_NS + 1
            for sequence in range(24, 32):
                assert not channel._back_off.left
                ask(channel, request(sequence, Op.FLUSH_PAGE))
            assert channel._back_off.left == BACK_OFF_CALLS_MIN
            assert channel._back_off.calm_from == 32 + BACK_OFF_CALLS_MAX
    finally:
        server.close()
