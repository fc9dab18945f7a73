"""The heartbeat's rules at the exact tick, and the lease that goes with them."""

from __future__ import annotations

import errno

import pytest

from fs.block.reservations import ReservationConflict
from fs.cluster.fencing import Fence
from fs.cluster.heartbeat import Heartbeat, never_gone
from fs.cluster.region import SECTOR_BYTES, Beat, Region, decode, encode
from tests.t3_fs.cluster.world import TIMING

TICK_NS = TIMING.heartbeat_interval_ns
DEAD = TIMING.dead_threshold


class Bench:
    """Node 0 with its heartbeat; the test is all the other nodes, the clock and the disk."""

    def __init__(self) -> None:
        self.now_ns = 10**9
        self.sectors = [bytes(SECTOR_BYTES)] * 4
        self.before_write = self.after_write = 0
        self.error: OSError | None = None
        self.read_error: OSError | None = None
        self.gone: set[int] = set()
        self.fence = Fence("node web0 (0)", lambda: self.now_ns)
        self.heart = Heartbeat(
            Region(self, 0, 4),
            0,
            0xAA,
            timing=TIMING,
            fence=self.fence,
            clock=lambda: self.now_ns,
            names={0: "web0"},
            gone=lambda node, _: node in self.gone,
        )

    def read_sectors(self, sector: int, count: int) -> bytes:
        if self.read_error:
            raise self.read_error
        return b"".join(self.sectors[sector : sector + count])

    def write_sector(self, sector: int, data: bytes) -> None:
        self.now_ns += self.before_write
        if self.error:
            raise self.error
        self.sectors[sector] = data
        self.now_ns += self.after_write

    def beat(self, node: int, seq: int, generation: int = 0xB0, epoch: int = 0) -> None:
        """What another node wrote."""
        self.sectors[node] = encode(Beat(seq, node, generation, TIMING.dead_ms, epoch))

    def round(self) -> None:
        """The next round at its time."""
        self.now_ns = max(self.now_ns, self.heart.next_round_ns)
        assert self.heart.tick(self.now_ns)


@pytest.fixture
def bench() -> Bench:
    """A fresh one."""
    return Bench()


def live_bench(bench: Bench) -> int:
    """Node 1 beats until it is live; its last sequence number."""
    for seq in (1, 2, 3):
        bench.beat(1, seq)
        bench.round()
    assert bench.heart.live[1] == 0xB0
    return 3


def test_a_round_comes_at_the_exact_tick(bench: Bench) -> None:
    """Not before the interval is over, and once only."""
    assert bench.heart.tick(bench.now_ns)
    assert not bench.heart.tick(bench.now_ns + TICK_NS - 1)
    assert bench.heart.tick(bench.now_ns + TICK_NS)
    assert not bench.heart.tick(bench.now_ns + TICK_NS)


def test_live_after_two_changes(bench: Bench) -> None:
    """What stood there from former times is the first of them, as in o2hb."""
    bench.round()
    bench.beat(1, 1)
    bench.round()
    assert 1 not in bench.heart.live
    bench.beat(1, 2)
    bench.round()
    assert bench.heart.live[1] == 0xB0


def test_this_node_is_live_when_it_is_steady(bench: Bench) -> None:
    """After three good rounds."""
    for _ in range(2):
        bench.round()
        assert bench.heart.live == {}
    bench.round()
    assert bench.heart.live == {0: 0xAA}


def test_dead_after_exactly_the_threshold(bench: Bench) -> None:
    """A change in between starts the count again."""
    seq = live_bench(bench)
    for _ in range(DEAD - 1):
        bench.round()
        assert 1 in bench.heart.live
    bench.beat(1, seq + 1)
    for _ in range(DEAD):
        bench.round()
        assert 1 in bench.heart.live
    bench.round()
    assert 1 not in bench.heart.live
    assert bench.heart.silent()


def test_a_stopped_observer_counts_one_sample(bench: Bench) -> None:
    """However long it slept: it can't say that the others didn't beat meanwhile."""
    live_bench(bench)
    for _ in range(DEAD - 1):
        bench.round()
    bench.now_ns += 3 * TICK_NS
    bench.fence.renew(bench.now_ns + 10 * TICK_NS)
    bench.beat(1, 99)
    bench.round()
    assert 1 in bench.heart.live


def test_a_long_read_does_not_bring_death_nearer(bench: Bench) -> None:
    """Samples that come in quick succession after a stall don't make up the time."""
    live_bench(bench)
    changed_at_ns = bench.now_ns
    bench.heart.next_round_ns = 0
    for step in range(DEAD + 3):
        bench.heart.tick(changed_at_ns + step)
        bench.heart.next_round_ns = 0
    assert 1 in bench.heart.live


def test_a_new_generation_is_a_death(bench: Bench) -> None:
    """Then two changes make the new incarnation live; generation 0 never is."""
    seq = live_bench(bench)
    bench.beat(1, seq + 1, generation=0xB1)
    bench.round()
    assert 1 not in bench.heart.live
    bench.beat(1, seq + 2, generation=0xB1)
    bench.round()
    assert bench.heart.live[1] == 0xB1
    for more in range(3, 6):
        bench.beat(1, seq + more, generation=0)
        bench.round()
        assert 1 not in bench.heart.live
    assert 1 not in bench.heart.unclean()


def test_a_bad_checksum_is_a_sample_without_change(bench: Bench) -> None:
    """Once or twice does no harm, for ever is death."""
    live_bench(bench)
    bench.sectors[1] = b"\xff" * SECTOR_BYTES
    for _ in range(DEAD - 1):
        bench.round()
        assert bench.heart.live[1] == 0xB0
    bench.round()
    assert 1 not in bench.heart.live


def test_a_process_that_has_ended_is_dead_at_once_and_stays_dead(bench: Bench) -> None:
    """No dead time for it, and no second life by what it wrote last."""
    live_bench(bench)
    bench.gone.add(1)
    for _ in range(3):
        bench.round()
        assert 1 not in bench.heart.live
    assert bench.heart.silent()
    assert not never_gone(1, 2)


def test_unclean_nodes_are_silent_only_after_the_dead_time(bench: Bench) -> None:
    """A lease that a stopped node may have must run out first."""
    bench.beat(2, 5)
    for _ in range(DEAD):
        bench.round()
        assert bench.heart.unclean() == {2: 0xB0}
        assert not bench.heart.silent()
    bench.round()
    assert bench.heart.silent()


def test_the_lease_runs_from_before_the_write(bench: Bench) -> None:
    """To the nanosecond, with a slow disk."""
    bench.before_write = 7
    bench.after_write = 3
    began_ns = bench.now_ns
    bench.round()
    end_ns = began_ns + TIMING.write_timeout_ns
    assert bench.fence.lease_end_ns == end_ns
    bench.now_ns = end_ns - 1
    bench.fence.check()
    bench.now_ns = end_ns
    with pytest.raises(OSError, match=r"node web0 \(0\) is fenced: its heartbeat") as caught:
        bench.fence.check()
    assert caught.value.errno == errno.EIO
    bench.fence.renew(end_ns + 10**9)
    bench.now_ns = 0
    with pytest.raises(OSError, match="fenced"):
        bench.fence.check()


def test_no_lease_before_the_first_beat(bench: Bench) -> None:
    """Who is not in the cluster may not write."""
    with pytest.raises(OSError, match="not in the cluster yet"):
        bench.fence.check()


def test_a_write_that_ends_after_the_lease_does_not_renew_it(bench: Bench) -> None:
    """Others may have counted up to the old end: fenced, though the beat is on the disk."""
    bench.round()
    bench.after_write = TIMING.write_timeout_ns
    bench.round()
    assert bench.fence.expired()
    assert not bench.heart.tick(bench.now_ns + TICK_NS)


def test_a_disk_that_does_not_take_writes_fences(bench: Bench) -> None:
    """At the write timeout, not before; and the problem is known meanwhile."""
    for _ in range(3):
        bench.round()
    last_ns = bench.now_ns
    bench.error = OSError(errno.EIO, "broken")
    while bench.now_ns + TICK_NS < last_ns + TIMING.write_timeout_ns:
        bench.round()
        assert not bench.fence.expired()
        assert bench.heart.problem is not None and "write" in bench.heart.problem
    bench.now_ns = last_ns + TIMING.write_timeout_ns
    assert bench.fence.expired()


def test_a_disk_that_does_not_read_fences_too(bench: Bench) -> None:
    """A round that reads nothing writes nothing."""
    bench.round()
    bench.read_error = OSError(errno.EIO, "broken")
    before = bench.sectors[0]
    bench.round()
    assert bench.sectors[0] == before
    bench.now_ns += TIMING.write_timeout_ns
    assert bench.fence.expired()


def test_a_taken_reservation_fences_at_once(bench: Bench) -> None:
    """With the reason of the table."""
    bench.round()
    bench.error = ReservationConflict(errno.EIO, "node 0 was preempted by node 1")
    bench.round()
    assert bench.fence.reason == "node 0 was preempted by node 1"


def test_another_node_with_our_number_ends_our_lease(bench: Bench) -> None:
    """The own sector is compared before each write."""
    for _ in range(3):
        bench.round()
    end_ns = bench.fence.lease_end_ns
    seq = 50
    while not bench.fence.expired():
        seq += 1
        bench.beat(0, seq, generation=0xEE)
        bench.round() if not bench.fence.expired() else None
        bench.now_ns += TICK_NS
        assert bench.heart.problem is not None and "did not write" in bench.heart.problem
    assert bench.fence.lease_end_ns == end_ns


def test_clean_stop_and_what_the_next_incarnation_keeps(bench: Bench) -> None:
    """Generation 0 on the disk; sequence and epoch go on."""
    for _ in range(3):
        bench.round()
    assert bench.heart.publish(12, frozenset({0}))
    bench.heart.stop(clean=True)
    last = decode(bench.sectors[0])
    assert last is not None and (last.generation, last.epoch, last.members) == (0, 12, frozenset())
    again = Heartbeat(
        Region(bench, 0, 4), 0, 0xAB, timing=TIMING,
        fence=Fence("node 0", lambda: bench.now_ns), clock=lambda: bench.now_ns,
    )  # fmt: skip
    assert again.tick(bench.now_ns)
    first = decode(bench.sectors[0])
    assert first == Beat(last.seq + 1, 0, 0xAB, TIMING.dead_ms, 12)
    assert again.highest_epoch == 12
