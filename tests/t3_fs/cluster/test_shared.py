"""One image, many real processes: after a preemption no write of the victim arrives any more."""

from __future__ import annotations

import errno
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from fs.block.device import BLOCK_BYTES
from fs.block.file import FileDevice
from fs.block.reservations import ReservationConflict, Reservations
from fs.block.shared import SharedDevice
from fs.errors import ImageError

BLOCKS = 64
PATIENCE_SECONDS = 30.0


class Writer:
    """The other end of `writer.py`."""

    def __init__(self, image: Path, node: int, key: int) -> None:
        command = [sys.executable, "-m", "tests.t3_fs.cluster.writer", str(image)]
        self.process = subprocess.Popen(
            [*command, str(node), str(key)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def wait_stopped(self) -> None:
        """Until the kernel says that it is stopped."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def wait_until(done: Callable[[], bool]) -> None:
    """Poll; the limit only ends a test that has failed."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Zeros."""
    path = tmp_path / "image"
    path.write_bytes(bytes(BLOCKS * BLOCK_BYTES))
    return path


@pytest.fixture
def survivor(image: Path) -> Iterator[SharedDevice]:
    """Node 1, in the process of the test."""
    device = SharedDevice(image, 1, 0x51, names={1: "web1", 2: "web2"})
    yield device
    device.close()


@pytest.fixture
def start(image: Path) -> Iterator[Callable[[int, int], Writer]]:
    """Starts other nodes as processes."""
    writers: list[Writer] = []

    def run(node: int, key: int) -> Writer:
        writers.append(Writer(image, node, key))
        assert writers[-1].answer() == "ready"
        return writers[-1]

    yield run
    for writer in writers:
        writer.close()


def content(image: Path, block: int, count: int = 1) -> bytes:
    """Past all devices."""
    return image.read_bytes()[block * BLOCK_BYTES : (block + count) * BLOCK_BYTES]


def filled(byte: int) -> bytes:
    """A block of one byte value."""
    return bytes([byte]) * BLOCK_BYTES


Start = Callable[[int, int], Writer]


def test_writes_of_several_nodes_are_seen_by_all(
    image: Path, survivor: SharedDevice, start: Start
) -> None:
    """At once, without a flush."""
    writer = start(2, 0x52)
    writer.tell("write 3 7")
    assert writer.answer() == "ok"
    into = bytearray(BLOCK_BYTES)
    survivor.read(3, 1, memoryview(into))
    assert bytes(into) == filled(7)
    survivor.write(3, 1, filled(8))
    survivor.flush()
    assert content(image, 3) == filled(8)


def test_a_writer_stopped_before_its_check_is_refused_when_it_wakes(
    image: Path, survivor: SharedDevice, start: Start
) -> None:
    """Its lease check is long past; the reservation holds."""
    writer = start(2, 0x52)
    writer.tell("before 3 7")
    assert writer.answer() == "stopping"
    writer.wait_stopped()
    assert survivor.preempt(2, 0x52)
    writer.process.send_signal(signal.SIGCONT)
    assert writer.answer() == "refused node 2 was preempted by node 1"
    assert content(image, 3) == filled(0)


def test_a_writer_stopped_inside_its_write_is_waited_for(
    image: Path, survivor: SharedDevice, start: Start
) -> None:
    """Preempting is not over before that write is; the next one is refused."""
    writer = start(2, 0x52)
    writer.tell("inside 3 7")
    assert writer.answer() == "stopping"
    writer.wait_stopped()
    for _ in range(50):
        assert not survivor.preempt(2, 0x52)
    assert content(image, 3) == filled(0)
    writer.process.send_signal(signal.SIGCONT)
    assert writer.answer() == "ok"
    wait_until(lambda: survivor.preempt(2, 0x52))
    assert content(image, 3) == filled(7)
    writer.tell("write 3 9")
    assert writer.answer().startswith("refused")
    assert content(image, 3) == filled(7)


def test_a_writer_that_stays_inside_its_write_is_killed(
    image: Path,
    survivor: SharedDevice,
    start: Start,
    expect_warning: Callable[[str], None],
) -> None:
    """That process and no other; and only after it was preempted."""
    expect_warning(r"node web2 \(2\) was stopped inside a write")
    writer = start(2, 0x52)
    writer.tell("inside 3 7")
    assert writer.answer() == "stopping"
    writer.wait_stopped()
    assert not survivor.finish_off(2, 0x99)
    assert not survivor.preempt(2, 0x52)
    assert survivor.finish_off(2, 0x52)
    wait_until(lambda: survivor.preempt(2, 0x52))
    assert writer.process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert content(image, 3) == filled(0)
    assert survivor.gone(2, 0x52)
    assert not survivor.finish_off(2, 0x52)


def test_a_killed_writer_holds_nobody_up(image: Path, survivor: SharedDevice, start: Start) -> None:
    """The kernel gives its byte back."""
    writer = start(2, 0x52)
    writer.tell("inside 3 7")
    assert writer.answer() == "stopping"
    writer.wait_stopped()
    assert not survivor.gone(2, 0x52)
    writer.process.kill()
    writer.process.wait(PATIENCE_SECONDS)
    assert survivor.gone(2, 0x52)
    assert survivor.preempt(2, 0x52)
    assert content(image, 3) == filled(0)


@pytest.mark.parametrize("seed", range(6))
def test_stopped_anywhere_nothing_arrives_after_the_preemption(
    image: Path, survivor: SharedDevice, start: Start, seed: int
) -> None:
    """A flood of writes, stopped at a random moment."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    writer = start(2, 0x52)
    writer.tell("flood 8 16")
    assert writer.answer() == "flooding"
    wait_until(lambda: any(content(image, 8, 16)))
    time.sleep(rng.random() * 0.03)
    writer.process.send_signal(signal.SIGSTOP)
    writer.wait_stopped()
    if not survivor.preempt(2, 0x52):
        # Stopped inside a write: that one may still come, before the preemption is over.
        writer.process.send_signal(signal.SIGCONT)
        wait_until(lambda: survivor.preempt(2, 0x52))
    before = content(image, 8, 16)
    writer.process.send_signal(signal.SIGCONT)
    assert writer.answer().startswith("refused")
    assert content(image, 8, 16) == before


def test_many_writers_at_once_and_one_of_them_preempted(
    image: Path, survivor: SharedDevice, start: Start
) -> None:
    """The others go on; each writes whole blocks into its own part."""
    writers = {node: start(node, 0x50 + node) for node in (2, 3, 4)}
    for node, writer in writers.items():
        writer.tell(f"flood {8 * node} 8")
    for writer in writers.values():
        assert writer.answer() == "flooding"
    wait_until(lambda: all(content(image, 8 * node + 7)[0] for node in writers))
    wait_until(lambda: survivor.preempt(3, 0x53))
    frozen = content(image, 24, 8)
    assert writers[3].answer().startswith("refused")
    others = content(image, 16, 8), content(image, 32, 8)
    wait_until(lambda: content(image, 16, 8) != others[0] and content(image, 32, 8) != others[1])
    assert content(image, 24, 8) == frozen
    for node in (2, 4):
        wait_until(partial(survivor.preempt, node, 0x50 + node))
        for block in range(8 * node, 8 * node + 8):
            data = content(image, block)
            assert data == data[:8] * (BLOCK_BYTES // 8)
            assert int.from_bytes(data[:8], "little") % 8 == block - 8 * node


def test_one_number_one_process(image: Path, start: Start) -> None:
    """The second is refused with the first one's pid; when that is gone it gets the number."""
    writer = start(2, 0x52)
    with pytest.raises(ImageError, match=f"node 2 is run by process {writer.process.pid} already"):
        SharedDevice(image, 2, 0x53)
    writer.close()
    device = SharedDevice(image, 2, 0x53)
    device.write(0, 1, filled(1))
    table = Reservations(f"{image}.reservations")
    assert not table.gone(2, 0x53)
    device.close()
    assert table.gone(2, 0x53)
    table.close()


def test_a_former_key_is_nobody_s(image: Path, survivor: SharedDevice) -> None:
    """Preempting a former incarnation leaves the new one alone."""
    old = SharedDevice(image, 2, 0x52)
    old.reservations.unregister(2, 0x52)
    new = SharedDevice(image, 2, 0x53)
    assert survivor.preempt(2, 0x52)
    new.write(0, 1, filled(5))
    with pytest.raises(ReservationConflict, match="node 2 was started again"):
        with old.reservations.guarded(2, 0x52):
            raise AssertionError
    new.close()
    old.close()


def test_refused_writes_are_counted_and_say_who(
    image: Path, survivor: SharedDevice, expect_warning: Callable[[str], None]
) -> None:
    """One line in the log, however many writes; sectors too."""
    expect_warning("a write is refused: node 2 was preempted by node 1")
    victim = SharedDevice(image, 2, 0x52)
    assert survivor.preempt(2, 0x52)
    for _ in range(3):
        with pytest.raises(ReservationConflict, match="preempted by node 1") as caught:
            victim.write(0, 1, filled(5))
        assert caught.value.errno == errno.EIO
    with pytest.raises(ReservationConflict):
        victim.write_sector(8, bytes(512))
    assert victim.refused == 4
    assert content(image, 0, 2) == bytes(2 * BLOCK_BYTES)
    victim.close()


class Over:
    """A lease that has run out."""

    def check(self) -> None:
        raise OSError(errno.EIO, "node 1 is fenced: test")


def test_without_a_lease_nothing_but_the_heartbeat_passes(
    image: Path, survivor: SharedDevice
) -> None:
    """Reads and flushes of a fenced node would be lies."""
    survivor.lease = Over()
    operations: list[Callable[[], None]] = [
        lambda: survivor.write(0, 1, filled(5)),
        lambda: survivor.read(0, 1, memoryview(bytearray(BLOCK_BYTES))),
        survivor.flush,
    ]
    for operation in operations:
        with pytest.raises(OSError, match="is fenced: test"):
            operation()
    assert survivor.refused == 1
    assert content(image, 0) == filled(0)
    survivor.write_sector(9, b"h" * 512)
    assert survivor.read_sectors(8, 3) == bytes(512) + b"h" * 512 + bytes(512)


@pytest.mark.parametrize(
    ("sector", "count"), [(-1, 1), (0, 0), (BLOCKS * 8, 1), (BLOCKS * 8 - 1, 2)]
)
def test_sectors_outside_are_refused(survivor: SharedDevice, sector: int, count: int) -> None:
    """EINVAL, and nothing is moved."""
    with pytest.raises(OSError, match="sectors"):
        survivor.read_sectors(sector, count)
    with pytest.raises(OSError, match="sector"):
        survivor.write_sector(sector, bytes(512 * (count != 2)) if count == 1 else b"")


def test_a_shared_image_is_no_one_s_alone(image: Path, survivor: SharedDevice) -> None:
    """Neither way round."""
    with pytest.raises(ImageError, match="in use by another guest"):
        FileDevice(image)
    survivor.close()
    alone = FileDevice(image)
    with pytest.raises(ImageError, match="in use by another guest"):
        SharedDevice(image, 1, 5)
    alone.close()


@pytest.mark.parametrize("damage", [b"x", b"tmemresv" + bytes(16376), bytes(16384)])
def test_a_strange_table_is_refused(image: Path, damage: bytes) -> None:
    """It says what to do; nothing leaks."""
    Path(f"{image}.reservations").write_bytes(damage)
    with pytest.raises(ImageError, match="remove it when no node uses the image"):
        SharedDevice(image, 1, 5)


def test_a_table_of_damaged_records_refuses_and_does_no_harm(image: Path) -> None:
    """Any bytes in the records: no crash, no signal to anyone."""
    table = Reservations(f"{image}.reservations")
    rng = random.Random(1)
    table._map[64:] = rng.randbytes(len(table._map) - 64)
    for node in range(0, 255, 50):
        key = table.key(node)
        assert not table.finish_off(node, key)
        assert table.preempt(node, key, 1)
        with pytest.raises(ReservationConflict):
            with table.guarded(node, key):
                raise AssertionError
    table.close()
