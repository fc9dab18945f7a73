"""The local transport: conformance, and the faults that it injects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ipc.abi import Op
from ipc.channel import Channel
from ipc.errors import Disconnected
from ipc.local import Fault, LocalChannel
from ipc.window import Window
from tests.t0_ipc.conformance import GENERATION, Opener, TransportConformance, request, serve


class TestLocal(TransportConformance):
    """Both ends in one process."""

    @pytest.fixture
    def open_channel(self) -> Opener:
        """A channel straight into `serve`."""

        @contextmanager
        def opened() -> Iterator[Channel]:
            channel = LocalChannel(serve, generation=GENERATION)
            try:
                yield channel
            finally:
                channel.close()

        return opened


@pytest.mark.parametrize(
    ("fault", "executed"), [(Fault.LOSE_REQUEST, 1), (Fault.LOSE_REPLY, 2)], ids=str
)
def test_a_fault_is_a_hypervisor_that_died_around_a_call(fault: Fault, executed: int) -> None:
    """Before or after executing it; the guest can't tell, and the channel is finished."""
    calls = []

    def count(message: bytes, window: Window) -> bytes:
        calls.append(message)
        return serve(message, window)

    channel = LocalChannel(count, faults=iter([Fault.NONE, fault]))
    channel.call(request(1, Op.FLUSH_PAGE))

    with pytest.raises(Disconnected):
        channel.call(request(2, Op.FLUSH_PAGE))
    with pytest.raises(Disconnected):
        channel.call(request(3, Op.FLUSH_PAGE))
    assert executed == len(calls)


@pytest.mark.parametrize(
    ("fault", "order"),
    [
        (Fault.LATE_REQUEST, ["others", "call"]),
        (Fault.LATE_REPLY, ["call", "others"]),
    ],
    ids=str,
)
def test_a_late_call_lets_others_go_first(fault: Fault, order: list[str]) -> None:
    """Before it is executed, or before its reply is read; what ends the channel then ends it."""
    seen = []

    def call(message: bytes, window: Window) -> bytes:
        seen.append("call")
        return serve(message, window)

    def others() -> None:
        seen.append("others")
        if len(seen) > 2:
            channel.close()

    channel = LocalChannel(call, faults=iter([fault, fault]), meanwhile=others)

    channel.call(request(1, Op.FLUSH_PAGE))
    assert seen == order
    with pytest.raises(Disconnected):
        channel.call(request(2, Op.FLUSH_PAGE))
    assert len(seen) == (3 if fault is Fault.LATE_REQUEST else 4)
