"""Timings: the original's defaults, what follows from them, and how two nodes' are compared."""

from __future__ import annotations

import pytest

from fs.cluster.config import Timing

SECOND_NS = 10**9


def test_the_defaults_are_o2cb_s() -> None:
    """60 s to write, 62 s to be dead, 66 s to the quorum decision."""
    timing = Timing()
    assert timing.write_timeout_ns == 60 * SECOND_NS
    assert timing.dead_ns == 62 * SECOND_NS
    assert timing.dead_ms == 62_000
    assert timing.quorum_delay_ns == 66 * SECOND_NS
    assert (timing.idle_timeout_ns, timing.keepalive_ns, timing.reconnect_ns) == (
        30 * SECOND_NS,
        2 * SECOND_NS,
        2 * SECOND_NS,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("heartbeat_interval_ns", 0),
        ("heartbeat_interval_ns", 4000 * SECOND_NS),
        ("dead_threshold", 1),
        ("dead_threshold", 1 << 31),
        ("keepalive_ns", 30 * SECOND_NS),
        ("idle_timeout_ns", -1),
    ],
)
def test_timings_that_cannot_work_are_refused_by_name(field: str, value: int) -> None:
    """The text says which."""
    with pytest.raises(ValueError, match=r"dead|heartbeat_interval_ns|keepalive|idle"):
        Timing(**{field: value})


def test_differences_name_both_nodes_and_both_values() -> None:
    """One clause a field."""
    mine, theirs = Timing(), Timing(dead_threshold=7, idle_timeout_ns=10 * SECOND_NS)
    assert mine.differences(theirs, "node a (1)", "node b (2)") == [
        "dead_threshold is 31 at node a (1) and 7 at node b (2)",
        "idle_timeout_ns is 30000000000 at node a (1) and 10000000000 at node b (2)",
    ]
    assert mine.differences(Timing(), "a", "b") == []


def test_timings_survive_the_wire_and_others_are_refused() -> None:
    """Too short, too long, or values that can't work."""
    timing = Timing.fast()
    assert Timing.decode(timing.encode()) == timing
    for data in (b"", timing.encode()[:-1], timing.encode() + b"\0", bytes(len(timing.encode()))):
        with pytest.raises(ValueError, match=r"timings of|heartbeat_interval_ns"):
            Timing.decode(data)
