"""Two nodes in one process: real sockets, one real image, and a clock that the test moves."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fs.block.device import BLOCK_BYTES
from fs.block.file import FileDevice
from fs.cluster.config import Timing
from fs.dlm.modes import Mode
from fs.ocfs2.mkfs import Parameters, blocks_needed, make_volume
from guests.kernel import GuestSpec, Kernel
from guests.node import Node, NodeSpec
from ipc.errors import OperatorError
from tests.support.clusters import short_folder
from tools import coherence
from tools.histories import check, read_history

TURN_NS = 10_000_000
NAME = b"M" + bytes(31)


class World:
    """The nodes; while one waits the others go on and time passes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now_ns = 10**12
        self.nodes: list[SteppedNode] = []
        self.image = folder / "image"
        parameters = Parameters(slots=2, uuid=bytes(range(16)), generation=5, now_s=1)
        with self.image.open("xb") as file:
            file.truncate((blocks_needed(parameters) + 256) * BLOCK_BYTES)
        device = FileDevice(self.image)
        make_volume(device, parameters, fresh=True)
        device.close()

    def node(self, number: int, timing: Timing) -> SteppedNode:
        """One that has its place on the disk, and has not joined."""
        return SteppedNode(self, number, timing)

    def run(self, until: Callable[[], bool], what: str) -> None:
        """Let all that are awake go on."""
        for _ in range(5000):
            if until():
                return
            self.now_ns += TURN_NS
            for node in self.nodes:
                node.go_on()
        raise AssertionError(f"never came: {what}")


class SteppedNode(Node):
    """A node that lets the others go on while it waits."""

    def __init__(self, world: World, number: int, timing: Timing) -> None:
        self._world = world
        self.asleep = False
        spec = NodeSpec("data", number, ("red", "blue"), bytes(32), timing)
        super().__init__(spec, world.image, world.folder, clock_ns=lambda: world.now_ns)
        world.nodes.append(self)

    def _turn(self, seconds: float) -> None:
        super()._turn(0.0)
        if seconds:
            self._world.now_ns += TURN_NS
            for other in self._world.nodes:
                if other is not self:
                    other.go_on()

    def go_on(self) -> None:
        """What its main loop does, unless it sleeps."""
        if not self.asleep:
            self.pump()

    def close(self) -> None:
        """It goes on no more."""
        self.asleep = True
        super().close()


@pytest.fixture
def world() -> Iterator[World]:
    """A volume that nobody has mounted yet."""
    with short_folder() as folder:
        made = World(folder)
        yield made
        for node in made.nodes:
            node.close()


def test_node_with_another_timing_is_refused(
    world: World, expect_warning: Callable[[str], None]
) -> None:
    """It would be dead to the others while it thinks it lives; the reason names both values."""
    expect_warning("heartbeat|timing|dead_threshold|refuse")
    red = world.node(0, Timing.fast())
    red.join()
    blue = world.node(1, replace(Timing.fast(), dead_threshold=9))

    with pytest.raises(OperatorError) as refusal:
        blue.join()

    assert "node blue (1) has another timing" in str(refusal.value)
    assert red.members == {0}
    assert red.fenced_because is None


def test_sleeper_is_stopped_by_its_lease_and_by_its_reservation(
    world: World, expect_warning: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither block layer lets a dead node's write through, nor its reads, nor its locks; and
    whatever a person reads of it names the nodes."""
    expect_warning("fenced|refused|silent|dead|lost")
    caplog.set_level(logging.INFO, "guests.node")
    red, blue = world.node(0, Timing.fast()), world.node(1, Timing.fast())
    red.join()
    blue.join()
    red.locks.acquire(NAME, Mode.EX)
    token = red.locks.token(NAME)
    red.locks.release(NAME, Mode.EX)
    block = world.image.stat().st_size // BLOCK_BYTES - 1
    red.device.write(block, 1, b"a" * BLOCK_BYTES)
    red.asleep = True
    world.run(lambda: blue.members == {1}, "a view without red")
    blue.locks.manager.release_dead(0)
    blue.locks.acquire(NAME, Mode.EX)
    assert blue.locks.token(NAME) > token > 0
    blue.device.write(block, 1, b"b" * BLOCK_BYTES)

    # Red is awake, in the middle of a write, and has not looked at anything yet.
    with pytest.raises(OSError, match=r"red.*fenced") as by_lease:
        red.device.write(block, 1, b"c" * BLOCK_BYTES)
    assert by_lease.value.errno == errno.EIO
    with pytest.raises(OSError, match="fenced"):
        red.device.read(block, 1, memoryview(bytearray(BLOCK_BYTES)))
    # Even if it did not look at its lease: others took its reservation.
    lease, red.device.lease = red.device.lease, None
    with pytest.raises(OSError, match="red"):
        red.device.write(block, 1, b"d" * BLOCK_BYTES)
    red.device.lease = lease
    assert red.device.refused == 2
    into = bytearray(BLOCK_BYTES)
    blue.device.read(block, 1, memoryview(into))
    assert into == b"b" * BLOCK_BYTES

    red.asleep = False
    world.run(lambda: red.fenced_because is not None, "red's fence")
    assert red.cluster.fence.expired()
    assert blue.fenced_because is None
    views = [line for line in caplog.messages if "event=view" in line]
    assert any("members=node red (0), node blue (1) dead=none" in line for line in views)
    assert views[-1].endswith("members=node blue (1) dead=node red (0)")
    # Blue's view reaches red's lock manager too, late.
    red.locks.manager.set_view(blue.epoch, blue.members)
    with pytest.raises(OSError, match=r"node red \(0\) is not in the cluster any more"):
        red.locks.acquire(NAME, Mode.EX)


@pytest.mark.parametrize("lies", [False, True])
def test_node_that_keeps_what_it_gave_up_is_found_out(
    world: World, monkeypatch: pytest.MonkeyPatch, *, lies: bool
) -> None:
    """The histories of two kernels are coherent; not if one forgets nothing with its locks."""
    kernels = kernels_of(world, monkeypatch)
    red = kernels[0]
    records = [world.folder / f"{kernel.name}.jsonl" for kernel in kernels]
    try:
        _start(red, 1, records[0], prepare=1, operations=0)
        while red.is_running:
            red.work()
        for seed, (kernel, record) in enumerate(zip(kernels, records, strict=True), 2):
            _start(kernel, seed, record, operations=600, files=1, pages=2)
        while any(kernel.is_running for kernel in kernels):
            if lies and (red.job.done if red.job is not None else 0) > 20:
                assert red.node is not None
                red.node.locks.downconvert = lambda _name, _to: None
            for kernel in kernels:
                kernel.work()
    finally:
        for kernel in reversed(kernels):
            with contextlib.suppress(OSError):
                kernel.stop()

    calls = [call for record in records for call in read_history(record.stem, record)]
    violations = check(calls)
    assert bool(violations) == lies, violations
    shared = coherence._shared_reads(calls)
    assert shared > 0
    verdict = coherence._verdict(violations, 0, [], [], shared)
    assert verdict == ("violated" if lies else "holds")


def kernels_of(world: World, monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """The guests red and blue, without a hypervisor."""
    monkeypatch.setattr(
        "guests.kernel.Node",
        lambda spec, _image, _folder, **_options: SteppedNode(world, spec.number, spec.timing),
    )
    kernels = []
    for number, name in enumerate(("red", "blue")):
        node = NodeSpec("data", number, ("red", "blue"), bytes(32), Timing.fast())
        spec = GuestSpec(name, world.image, 2**20, world.folder, attach=False, node=node)
        kernels.append(Kernel(spec, clock_ns=time.time_ns, now_seconds=time.monotonic))
    return kernels


def test_orphan_that_a_dead_node_had_open_is_freed(
    world: World, monkeypatch: pytest.MonkeyPatch, expect_warning: Callable[[str], None]
) -> None:
    """It is in the slot of a node that lives, which hears of no close."""
    expect_warning("fenced|refused|silent|dead|lost")
    red, blue = kernels_of(world, monkeypatch)
    try:
        handle = red.vfs.open("/f", os.O_CREAT | os.O_WRONLY)
        red.vfs.write(handle, bytes(10 * BLOCK_BYTES))
        red.vfs.close(handle)
        blue.vfs.open("/f")
        free = red.vfs.statfs().blocks_free
        red.vfs.unlink("/f")
        assert red.vfs.statfs().blocks_free == free
        assert isinstance(blue.node, SteppedNode)
        blue.node.asleep = True
        world.run(lambda: red.vfs.statfs().blocks_free == free + 10, "the end of the orphan")
    finally:
        red.stop()
        with contextlib.suppress(OSError):
            blue.stop()


def _start(kernel: Kernel, seed: int, record: Path, **parameters: int) -> None:
    kernel.start("histories", seed, {"record": str(record), **parameters})
