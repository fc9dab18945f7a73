"""Programs of a guest against plain bytes: memory several times as large as RAM, forks, deaths.

The hypervisor refuses, evicts, dies before or after any call and comes back with or without its
memory. A program reads what it wrote, or was killed and its record says why; never anything else.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fs.block.device import BlockDevice
from fs.block.faulty import FaultyDevice
from guests.attachment import RETRY_SECONDS as REATTACH_SECONDS
from guests.kernel import Kernel
from guests.process import Process, ProcessKilled
from guests.swap import RETRY_SECONDS
from guests.swapdisk import make_swap
from hypervisor.administration import Administration
from ipc.local import Fault
from tests.t4_guest.worlds import (
    PAGE,
    LocalHypervisor,
    Time,
    check_pages,
    check_programs,
    read_file,
    running_kernel,
    write_file,
)

STEPS = 1500
SEEDS = range(int(os.environ.get("TMEM_PROCESS_SEEDS", "3")))
SWAP_PAGES = 600


def swap_file(folder: Path, pages: int = SWAP_PAGES) -> Path:
    """A swap area of so many slots."""
    path = folder / "swap"
    with path.open("wb") as file:
        file.truncate((pages + 1) * PAGE)
    make_swap(path, uuid=bytes(range(16)), label="test")
    return path


class World:
    """Programs, and what the memory of each should hold."""

    def __init__(
        self, kernel: Kernel, seed: int, hypervisor: LocalHypervisor | None, time: Time
    ) -> None:
        self.kernel = kernel
        self.random = random.Random(seed)
        self.hypervisor = hypervisor
        self.time = time
        self.trouble = 0.0
        self.maps: dict[Process, dict[int, bytearray]] = {}
        self.killed = 0
        self.lost = False
        """The hypervisor has lost its memory: programs may be killed for that."""
        if hypervisor is not None:
            hypervisor.draw_fault = self.draw_fault

    def draw_fault(self) -> Fault:
        if self.random.random() >= self.trouble:
            return Fault.NONE
        return self.random.choice((Fault.LOSE_REQUEST, Fault.LOSE_REPLY))

    def step(self) -> None:
        rng = self.random
        self.time.seconds += rng.choice((0.0, 0.0, 0.1, 0.6))
        choice = rng.random()
        if choice < 0.03 or not self.maps:
            self.maps[self.kernel.userland.processes.spawn("program")] = {}
            return
        process = rng.choice(list(self.maps))
        try:
            self.act(process, self.maps[process], rng.random())
        except ProcessKilled:
            self.bury(process)
        for one in list(self.maps):
            if not one.is_alive:
                self.bury(one)
        if rng.random() < 0.3:
            self.kernel.idle()

    def act(self, process: Process, maps: dict[int, bytearray], choice: float) -> None:
        rng = self.random
        if choice < 0.1 or not maps:
            pages = rng.randrange(1, 60)
            maps[process.map(pages * PAGE - rng.randrange(PAGE))] = bytearray(pages * PAGE)
            return
        address = rng.choice(list(maps))
        content = maps[address]
        start = rng.randrange(len(content))
        size = rng.randrange(1, min(len(content) - start, 8 * PAGE) + 1)
        if choice < 0.5:
            data = rng.randbytes(size)
            process.write(address + start, data)
            content[start : start + size] = data
        elif choice < 0.88:
            assert process.read(address + start, size) == content[start : start + size]
        elif choice < 0.92:
            child = process.fork()
            self.maps[child] = {place: bytearray(bytes_) for place, bytes_ in maps.items()}
        elif choice < 0.96:
            process.unmap(address, len(content))
            del maps[address]
        elif len(self.maps) > 4:
            process.exit()
            del self.maps[process]

    def bury(self, process: Process) -> None:
        kill = process.killed
        assert kill is not None, "a program that was not killed is told that it was"
        assert kill in self.kernel.userland.processes.kills or self.killed > 90
        text = str(kill)
        if "Out of memory" not in text:
            assert self.lost, text
        self.killed += 1
        del self.maps[process]

    def look(self) -> None:
        """All that is there is right."""
        for process, maps in list(self.maps.items()):
            try:
                for address, content in maps.items():
                    assert process.read(address, len(content)) == content
            except ProcessKilled:
                self.bury(process)
        # Those that were read first may have been killed for those that were read last.
        for process in [one for one in self.maps if not one.is_alive]:
            self.bury(process)


@pytest.mark.parametrize("seed", SEEDS)
def test_programs_without_a_hypervisor(
    image: Path, tmp_path: Path, seed: int, expect_warning: Callable[[str], None]
) -> None:
    """Swap alone: what does not fit is on the disk, and too much is somebody's end."""
    expect_warning("event=killed")
    time = Time()
    with running_kernel(image, time=time, swap=swap_file(tmp_path, 150)) as kernel:
        world = World(kernel, seed, None, time)
        write_file(kernel, "/f", random.Random(seed).randbytes(20 * PAGE))
        for number in range(STEPS):
            world.step()
            if not number % 50:
                check_programs(kernel)
                check_pages(kernel.pages)
        world.look()
        counters = kernel.counters()
        assert counters["swap"]["out_pages"] > 100
        assert counters["swap"]["in_pages"] > 100
        assert counters["anonymous"]["copies"] > 10
        assert counters["anonymous"]["oom_kills"] == world.killed
        assert read_file(kernel, "/f") == random.Random(seed).randbytes(20 * PAGE)


@pytest.mark.parametrize("seed", SEEDS)
def test_programs_over_a_hypervisor_that_dies(
    image: Path, tmp_path: Path, seed: int, expect_warning: Callable[[str], None]
) -> None:
    """It comes back with its memory, or without: then whoever had pages there is killed."""
    expect_warning("event=(killed|disconnected|not-attached|lost|no-pool|refused)")
    time = Time()
    hypervisor = LocalHypervisor(1 << 20)
    with running_kernel(image, hypervisor, time=time, swap=swap_file(tmp_path)) as kernel:
        world = World(kernel, seed, hypervisor, time)
        for number in range(STEPS):
            if not number % 97:
                world.trouble = world.random.choice((0.0, 0.0, 0.02))
            if number % 211 == 210:
                lost = world.random.random() < 0.4
                world.lost |= lost
                hypervisor.kill(arena_lost=lost)
                hypervisor.start()
            world.step()
            if not number % 50:
                check_programs(kernel, hypervisor)
        world.trouble = 0.0
        time.seconds += REATTACH_SECONDS
        world.look()
        check_programs(kernel, hypervisor)
        front = kernel.counters()["frontswap"]
        assert front["succ_stores"] > 100
        assert front["loads"] > 50
        assert kernel.counters()["swap"]["out_pages"] > 0
        hypervisor.check()


def test_pages_survive_restarts_and_none_is_zero(
    image: Path, tmp_path: Path, expect_warning: Callable[[str], None]
) -> None:
    """Four times the RAM, and a hypervisor that is killed again and again on the same memory."""
    expect_warning("event=(disconnected|not-attached)")
    time = Time()
    hypervisor = LocalHypervisor(2 << 20)
    with running_kernel(image, hypervisor, time=time, swap=swap_file(tmp_path)) as kernel:
        process = kernel.userland.processes.spawn("big")
        pages = 4 * kernel.memory.budget.frames
        address = process.map(pages * PAGE)
        rng = random.Random(5)
        content = [rng.randbytes(PAGE) for _ in range(pages)]
        for number, page in enumerate(content):
            process.write(address + number * PAGE, page)
            if number % 40 == 39:
                hypervisor.kill()
                hypervisor.start()
                time.seconds += REATTACH_SECONDS
        assert kernel.counters()["frontswap"]["curr_pages"] > 50
        for number in rng.sample(range(pages), pages):
            if number % 40 == 39:
                hypervisor.kill()
                hypervisor.start()
                time.seconds += REATTACH_SECONDS
            assert process.read(address + number * PAGE, PAGE) == content[number]
        assert not kernel.userland.processes.kills


def test_a_hypervisor_without_its_memory_ends_who_had_pages_there(
    image: Path, tmp_path: Path, expect_warning: Callable[[str], None]
) -> None:
    """Nobody else, with a report, and the guest lives."""
    expect_warning("event=(killed|disconnected|lost)")
    time = Time()
    hypervisor = LocalHypervisor()
    with running_kernel(image, hypervisor, time=time, swap=swap_file(tmp_path)) as kernel:
        processes = kernel.userland.processes
        robbed, also, other = (processes.spawn(name) for name in ("robbed", "also", "other"))
        (address,) = {process.map(100 * PAGE) for process in (robbed, also)}
        for process in (robbed, also):
            process.write(address, process.name[:1].encode() * 100 * PAGE)
        own = other.map(PAGE)
        other.write(own, b"o" * PAGE)
        assert robbed.table.swapped_pages > 50 < also.table.swapped_pages
        assert other.table.swapped_pages == 0
        hypervisor.kill(arena_lost=True)
        hypervisor.start()
        # Whoever needs a page is told there, the others before they can see anything.
        with pytest.raises(ProcessKilled, match=r"Bus error.*lost.*\(robbed\)"):
            robbed.read(address, 100 * PAGE)
        kernel.idle()
        with pytest.raises(ProcessKilled, match=r"pages were lost .* \(also\)"):
            also.read(address, 1)
        assert other.read(own, PAGE) == b"o" * PAGE
        assert [kill.name for kill in processes.kills] == ["robbed", "also"]
        assert kernel.counters()["frontswap"]["lost"] > 100
        check_programs(kernel)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_swap_disk_with_bad_blocks(
    image: Path, tmp_path: Path, kind: str, expect_warning: Callable[[str], None]
) -> None:
    """A read error ends the program that needs the page; a write error costs a slot, nobody."""
    expect_warning("event=(killed|write-error)")
    devices: list[FaultyDevice] = []

    def stack(device: BlockDevice) -> BlockDevice:
        devices.append(FaultyDevice(device, random.Random(0)))
        return devices[0]

    with running_kernel(
        image, swap=swap_file(tmp_path), swap_stack=stack, memory_bytes=200 * PAGE
    ) as kernel:
        process = kernel.userland.processes.spawn("program")
        pages = 2 * kernel.memory.budget.frames
        address = process.map(pages * PAGE)
        bad = set(range(10, 80))  # more than a batch
        if kind == "write":
            devices[0].bad_writes |= bad
        for number in range(pages):
            process.write(address + number * PAGE, number.to_bytes(4, "little") * 1024)
        if kind == "read":
            devices[0].bad_reads |= bad
            with pytest.raises(ProcessKilled, match="Bus error"):
                process.read(address, pages * PAGE)
            assert kernel.counters()["anonymous"]["oom_kills"] == 0
        else:
            for number in range(pages):
                page = process.read(address + number * PAGE, PAGE)
                assert page == number.to_bytes(4, "little") * 1024
            assert kernel.counters()["swap"]["retired_pages"] == len(bad)
            assert not kernel.userland.processes.kills
        check_programs(kernel)
        write_file(kernel, "/f", b"the guest lives")
        assert read_file(kernel, "/f") == b"the guest lives"


@pytest.mark.parametrize("tmem", [False, True])
def test_a_full_disk_of_the_host(
    image: Path,
    tmp_path: Path,
    tmem: bool,
    expect_warning: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Pages stay where they are or go where there is room; a person is told once; when the disk has
    room again all slots are as good as before."""
    expect_warning("event=(disk-full|killed why=Out of memory)")
    devices: list[FaultyDevice] = []
    time = Time()

    def stack(device: BlockDevice) -> BlockDevice:
        devices.append(FaultyDevice(device, random.Random(0)))
        return devices[0]

    hypervisor = LocalHypervisor(1 << 19) if tmem else None
    with running_kernel(
        image, hypervisor, time=time, swap=swap_file(tmp_path), swap_stack=stack
    ) as kernel:
        processes = kernel.userland.processes
        content = bytearray()

        def grow(pages: int) -> None:
            number = len(content) // PAGE
            for page in range(number, number + pages):
                content.extend(random.Random(page).randbytes(PAGE))
                process.write(address + page * PAGE, content[-PAGE:])

        process = processes.spawn("program")
        address = process.map(600 * PAGE)
        # Of a file with holes those pages have room that were written before.
        devices[0].no_room = set(range(1, SWAP_PAGES + 1)) - set(range(300, 500 if tmem else 400))
        grow(kernel.memory.budget.frames + (100 if tmem else 60))
        assert process.read(address, len(content)) == content
        swap = kernel.counters()["swap"]
        assert swap["lost_writes_pages"] > 30 and swap["out_pages"] > 30
        assert not swap["retired_pages"] and not processes.kills
        other = processes.spawn("other")
        other.oom_score_adj = 1000
        with pytest.raises(ProcessKilled, match="Out of memory"):
            other.write(other.map(400 * PAGE), bytes(400 * PAGE))
        assert process.read(address, len(content)) == content
        assert sum("disk-full" in record.message for record in caplog.records) == 1

        devices[0].no_room.clear()
        time.seconds += RETRY_SECONDS
        grow(100)
        assert process.read(address, len(content)) == content
        swap = kernel.counters()["swap"]
        assert swap["refused_pages"] == swap["retired_pages"] == 0
        assert len(processes.kills) == 1
        check_programs(kernel, hypervisor)


def test_tmem_has_room_while_the_disk_has_none(
    image: Path, tmp_path: Path, hypervisor: LocalHypervisor, expect_warning: Callable[[str], None]
) -> None:
    """It needs slots only as names: those that the disk has refused will do."""
    expect_warning("event=(disk-full|killed why=Out of memory)")

    def stack(device: BlockDevice) -> BlockDevice:
        faulty = FaultyDevice(device, random.Random(0))
        faulty.no_room = set(range(1, SWAP_PAGES + 1))
        return faulty

    with running_kernel(image, hypervisor, swap=swap_file(tmp_path), swap_stack=stack) as kernel:
        administration = Administration(hypervisor.machine)
        size = (kernel.memory.budget.frames + 40) * PAGE
        administration.answer({"verb": "freeze", "guest": "guest"})
        victim = kernel.userland.processes.spawn("victim")
        with pytest.raises(ProcessKilled):
            victim.write(victim.map(size), bytes(size))
        assert kernel.counters()["swap"]["refused_pages"] == SWAP_PAGES
        administration.answer({"verb": "thaw", "guest": "guest"})
        content = random.Random(1).randbytes(size)
        process = kernel.userland.processes.spawn("program")
        address = process.map(len(content))
        process.write(address, content)
        assert process.read(address, len(content)) == content
        assert kernel.counters()["frontswap"]["succ_stores"] > 30
        check_programs(kernel, hypervisor)
