"""Signals wait for a safe point."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tools.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_is_noticed_at_the_next_check_and_not_before(number: signal.Signals) -> None:
    """Between two checks nothing is torn; handlers are as before afterwards."""
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        interrupts.check()
        os.kill(os.getpid(), number)
        survived = True
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()

    assert survived
    assert signal.getsignal(number) == before


def test_sleep_ends_early_when_a_signal_comes() -> None:
    """A minute's sleep does not hold up Ctrl-C."""
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with Interrupts() as interrupts:
        timer.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            interrupts.sleep(60)
    timer.join()

    assert time.monotonic() - start < 30
