"""The least that the demo's calls could cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.clusters import ROOT
from tools.bench.floor import Floor

_PROGRAM = "from tools.bench.floor import measure; print(*measure(512, 4, calls=50))"


@pytest.mark.cluster
def test_each_part_is_measured() -> None:
    """By a hypervisor that is really started and called; none of it is free."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    start_us, call_us, page_us = map(float, done.stdout.split())
    assert start_us > call_us > page_us > 0


def test_parts_are_multiplied_by_what_was_counted() -> None:
    """The start counts once."""
    assert Floor(100.0, 10.0, 1.0).total_us(calls=3, pages=20) == 150.0
