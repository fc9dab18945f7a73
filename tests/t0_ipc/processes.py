"""Two processes and a real transport between them: the conformance suite, and what goes wrong when
one of them dies, is slow, or is interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ipc import attach
from ipc.abi import Op
from ipc.channel import Channel
from ipc.errors import Disconnected
from ipc.mqueue import QueueChannel
from ipc.names import Registry
from tests.support.hypervisors import ROOT
from tests.t0_ipc.conformance import (
    SLEEP_SECONDS,
    Opener,
    TransportConformance,
    ask,
    request,
)

GUESTS = 12
"""Guests at once: 24 of the machine's 256 queues, which other test workers need too."""


class EchoProcess:
    """A running echo server; one that does not watch sleeps between calls at once."""

    def __init__(self, run_directory: Path, cluster: str, *, watches: bool = True) -> None:
        self.run_directory = run_directory
        how = ["watch"] if watches else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.t0_ipc.echo_server", run_directory, cluster, *how],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    @contextmanager
    def opened(self, *, ring: bool = False) -> Iterator[QueueChannel]:
        channel = attach.connect(self.run_directory, "guest", bytes(32), ring=ring)
        try:
            yield channel
        finally:
            channel.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.process.communicate()
        Registry(self.run_directory).clean()


@contextmanager
def alarms(handler: object, first_seconds: float, interval_seconds: float) -> Iterator[None]:
    """SIGALRM to this process; the test runner's own alarm is put back."""
    theirs = signal.getsignal(signal.SIGALRM)
    timer = signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)  # type: ignore[arg-type]
    signal.setitimer(signal.ITIMER_REAL, first_seconds, interval_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, theirs)
        signal.setitimer(signal.ITIMER_REAL, *timer)


class ProcessTransport(TransportConformance):
    """Inherit, and say which transport; `watches` is the server's half of waiting."""

    ring = False
    watches = True

    @pytest.fixture(scope="class")
    @classmethod
    def echo(
        cls, tmp_path_factory: pytest.TempPathFactory, new_cluster_name: Callable[[], str]
    ) -> Iterator[EchoProcess]:
        """The other end, in its own process; each test has channels of its own to it."""
        run_directory = tmp_path_factory.mktemp("echo")
        server = EchoProcess(run_directory, new_cluster_name(), watches=cls.watches)
        yield server
        server.close()

    @pytest.fixture
    def mortal(self, tmp_path: Path, cluster_name: str) -> Iterator[EchoProcess]:
        """The same for a test that kills it."""
        server = EchoProcess(tmp_path, cluster_name, watches=self.watches)
        yield server
        server.close()

    @contextmanager
    def opened(self, echo: EchoProcess) -> Iterator[QueueChannel]:
        """A channel to the echo server."""
        with echo.opened(ring=self.ring) as channel:
            yield channel

    @pytest.fixture
    def open_channel(self, echo: EchoProcess) -> Opener:
        """Channels to the echo server."""

        @contextmanager
        def opened() -> Iterator[Channel]:
            with self.opened(echo) as channel:
                yield channel

        return opened

    def test_a_longer_message_can_not_be_sent(self, channel: Channel) -> None:
        """There is room for 64 bytes; the channel goes on as it was."""
        with pytest.raises(ValueError, match="too long"):
            channel.call(bytes(65))
        assert ask(channel, request(2, Op.FLUSH_PAGE)).sequence == 2

    def test_a_call_to_a_killed_peer_is_disconnected(self, mortal: EchoProcess) -> None:
        """Queues and windows outlive their maker; the door tells."""
        with self.opened(mortal) as channel:
            ask(channel, request(1, Op.FLUSH_PAGE))
            mortal.kill()

            with pytest.raises(Disconnected):
                channel.call(request(2, Op.FLUSH_PAGE))

    def test_a_peer_that_is_killed_during_a_call_is_noticed(self, mortal: EchoProcess) -> None:
        """The call was received and never answered."""
        with self.opened(mortal) as channel:
            killer = threading.Timer(SLEEP_SECONDS / 3, mortal.process.kill)
            killer.start()

            with pytest.raises(Disconnected):
                channel.call(request(1, Op.VERSION))
            killer.join()

    def test_a_slow_peer_is_waited_for(self, echo: EchoProcess) -> None:
        """Patience is no time-out: a stopped hypervisor that goes on still answers."""
        with self.opened(echo) as channel:
            echo.process.send_signal(signal.SIGSTOP)
            waker = threading.Timer(SLEEP_SECONDS, echo.process.send_signal, (signal.SIGCONT,))
            waker.start()

            assert ask(channel, request(1, Op.FLUSH_PAGE, token=5)).value == 5
            waker.join()

    def test_a_signal_during_a_call_is_survived(self, channel: Channel) -> None:
        """The handler runs, many times, and the call still gets its reply."""
        ticks = []
        with alarms(lambda *_: ticks.append(1), 0.01, 0.01):
            reply = ask(channel, request(1, Op.VERSION, token=11))

        assert reply.value == 11
        assert len(ticks) > 3

    def test_the_reply_to_a_call_that_was_cut_short_is_not_mistaken(self, channel: Channel) -> None:
        """Ctrl-C leaves a call; the next call drops its late reply."""

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), alarms(interrupt, SLEEP_SECONDS / 3, 0):
            channel.call(request(1, Op.VERSION, token=1))

        assert ask(channel, request(2, Op.FLUSH_PAGE, token=2)).value == 2

    def test_calls_that_are_cut_short_anywhere_harm_no_later_call(self, channel: Channel) -> None:
        """Whatever the guest was just doing: each call that returns returns its own reply."""

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        returned = cut_short = 0
        sequence = 0
        while returned < 200 or cut_short < 100:
            sequence += 1
            try:
                with alarms(interrupt, 0.0002 + sequence % 7 * 1e-5, 0):
                    for _ in range(100):
                        sequence += 1
                        message = request(sequence, Op.FLUSH_PAGE, token=sequence * 3)
                        assert ask(channel, message).value == sequence * 3
                        returned += 1
            except KeyboardInterrupt:
                cut_short += 1

    def test_many_guests_at_once_get_their_own_replies(self, echo: EchoProcess) -> None:
        """From threads, so that their calls really overlap."""
        wrong: list[tuple[int, int]] = []

        def work(guest: int, channel: QueueChannel) -> None:
            for sequence in range(100):
                token = guest << 32 | sequence
                if ask(channel, request(sequence, Op.FLUSH_PAGE, token=token)).value != token:
                    wrong.append((guest, sequence))

        with ExitStack() as stack:
            channels = [stack.enter_context(self.opened(echo)) for _ in range(GUESTS)]
            threads = [
                threading.Thread(target=work, args=(guest, channel))
                for guest, channel in enumerate(channels)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        assert wrong == []
