"""Signals wait for a safe point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.support.clusters import environment
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


STARTING = """
import os, signal
from tools.interrupts import Interrupts
from tools.processes import _sigint_ignored
with Interrupts() as interrupts:
    with _sigint_ignored():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        interrupts.check()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        interrupts.check()
    except KeyboardInterrupt:
        print("noticed")
"""


def test_what_comes_while_processes_are_started_is_not_lost() -> None:
    """They ignore Ctrl-C from then on; we notice it when they are there.  In a process of one
    thread, as the supervisor is: a thread of pytest's would take the signal."""
    done = subprocess.run(
        [sys.executable, "-c", STARTING],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert (done.stdout, done.stderr) == ("noticed\n", "")
