"""What calls cost: latencies in buckets, CPU time divided among who caused it."""

from __future__ import annotations

import pytest

from hypervisor.accounting import Account, Histogram, OpCount, divide_cpu
from ipc.abi import Op


@pytest.mark.parametrize("duration_ns", [0, 1, 7, 8, 9, 1000, 3500, 4095, 4096, 10**9])
def test_a_quantile_is_at_most_a_quarter_above_the_duration(duration_ns: int) -> None:
    """And never below it, nor above the greatest."""
    histogram = Histogram()
    histogram.add([duration_ns] * 3)
    histogram.add([10**10])
    assert histogram.total == 4
    assert duration_ns <= histogram.quantile_ns(0.5) <= 1.25 * duration_ns
    assert histogram.quantile_ns(1.0) == histogram.max_ns == 10**10


def test_latencies_are_there_before_they_are_booked() -> None:
    """Each call once, however often somebody asks in between."""
    count = OpCount()
    for duration_ns in (100, 200):
        count.served(duration_ns)
        assert count.latency.max_ns == duration_ns
    count.book(5)
    assert count.latency.total == 2
    assert (count.service_ns, count.cpu_ns) == (0, 5)


def test_cpu_time_is_divided_by_service_time() -> None:
    """Of the calls since it was done last; nobody pays when nobody called."""
    one, other = Account(), Account()
    one.get.served(300)
    one.operations[Op.FLUSH_PAGE].served(100)
    other.put.served(600)
    other.put.served(1000)
    assert other.put.latency.total == 2  # settled early
    assert divide_cpu([one, other], 4000) == 4000
    assert (one.cpu_ns, one.get.cpu_ns, other.put.cpu_ns) == (800, 600, 3200)
    assert divide_cpu([one, other], 4000) == 0
    one.get.served(1)
    assert divide_cpu([one, other], 70) == 70
    assert (one.get.cpu_ns, other.cpu_ns) == (670, 3200)
