"""Page states: in step with what frames hold; what the host drops is found out and read again."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from guests.attachment import RETRY_SECONDS
from guests.kernel import Kernel
from guests.memory import FRAMES_MIN
from guests.monitor import GROW_PAGES
from guests.pagestates import DISCARDED, STABLE, UNUSED, VOLATILE
from guests.proc import virtual_file
from guests.process import Process
from hypervisor.arena import layout
from tests.t4_guest.test_balloon import resident_pages
from tests.t4_guest.test_model import World
from tests.t4_guest.test_processes import swap_file
from tests.t4_guest.worlds import (
    PAGE,
    LocalHypervisor,
    Time,
    assert_clean,
    check_pages,
    check_programs,
    make_image,
    read_file,
    running_kernel,
    write_file,
)

MIB = 1 << 20
MEMORY_BYTES = 360 * PAGE
PROGRAM_PAGES = 120


def allow(kernel: Kernel, pages: int) -> int:
    """What the host does when it decides on an allowance; which one it is."""
    assert kernel.userland.monitor is not None
    allowed = kernel.userland.balloon.set_target(pages)
    kernel.userland.monitor.step()
    return allowed


def fill_floor(kernel: Kernel) -> None:
    """A program that has as many pages as the host must leave to a guest."""
    process = kernel.userland.processes.spawn("floor")
    process.write(process.map(FRAMES_MIN * PAGE), b"floor" * (FRAMES_MIN * PAGE // 5))


def drop_all(kernel: Kernel) -> int:
    """Have all clean pages dropped; how many there were."""
    states = kernel.memory.states
    assert states is not None
    volatile = states.count(VOLATILE)
    size = kernel.userland.balloon.size_pages
    allow(kernel, size - kernel.memory.resident_free_pages - volatile)
    assert states.count(VOLATILE) == 0
    return volatile


def check_states(kernel: Kernel) -> None:
    """S1 and S2; the host has what was given to it, and no more can be taken than was allowed."""
    memory, pages, userland = kernel.memory, kernel.pages, kernel.userland
    assert memory.states is not None
    assert userland.monitor is not None
    states = memory.states.of
    unowned = {*memory._free, *memory._given_back}
    assert len(unowned) == len(memory._free) + len(memory._given_back)
    assert {frame for frame, state in enumerate(states) if state == UNUSED} == unowned
    assert all(states[frame] == STABLE for frame in userland.anonymous._tables)
    block = memoryview(bytearray(PAGE))
    for file in pages._files.values():
        for index, frame in file.frames.items():
            if index in file.dirty:
                assert states[frame] == STABLE
                continue
            assert states[frame] in (VOLATILE, DISCARDED)
            content = bytes(memory.page(frame))
            if states[frame] == DISCARDED:
                assert not any(content), "the host has dropped it"
                continue
            block[:] = bytes(PAGE)
            if (number := kernel.fs.map_blocks(file.inode, index, 1)[0]) != 0:
                kernel.fs.device.read(number, 1, block)
            past = max(0, file.inode.size - index * PAGE)
            assert content == bytes(block[:past]).ljust(PAGE, b"\0"), "not what the disk holds"
    assert memory._discarded_pages == memory.states.count(DISCARDED)
    headroom = userland.monitor.allowed_pages - userland.balloon.size_pages
    assert memory.claimable_pages <= max(0, min(headroom, len(memory._given_back)))
    assert memory.budget.frames - memory.given_back_pages >= FRAMES_MIN


def test_what_the_host_drops_is_read_again(image: Path) -> None:
    """Not a byte of it is served; the process gets smaller meanwhile; everything is counted."""
    content = random.Random(1).randbytes(500 * PAGE)
    with running_kernel(image, memory_bytes=4 * MIB, page_states=True) as kernel:
        fill_floor(kernel)
        write_file(kernel, "/f", content)
        kernel.vfs.sync()
        states = kernel.memory.states
        assert states is not None
        assert states.count(VOLATILE) == 500
        before = resident_pages()
        assert drop_all(kernel) == 500
        assert before - resident_pages() > 450
        assert kernel.memory.states is not None
        check_states(kernel)
        assert kernel.pages.cached_pages == 500, "the page cache was not told"

        allow(kernel, 1 << 30)
        reads = kernel.device.read_pages
        assert read_file(kernel, "/f") == content
        assert kernel.device.read_pages - reads >= 500
        assert states.discard_faults == 500
        assert states.count(DISCARDED) == 0
        check_states(kernel)
        told = (virtual_file(kernel, "/proc/vmstat") or b"").decode()
        assert "cmm_discard_faults 500\n" in told
        assert "cmm_dropped_volatile_pages 500\n" in told
        figures = kernel.counters()["page_states"]
        assert (figures["volatile_pages"], figures["discarded_pages"]) == (500, 0)


def test_without_page_states_nothing_is_said_of_them(image: Path) -> None:
    """They cost nothing then."""
    with running_kernel(image) as kernel:
        assert kernel.counters()["page_states"] is None
        assert b"cmm_" not in (virtual_file(kernel, "/proc/vmstat") or b"cmm_")
        assert kernel.memory.states is None


def test_what_is_dirty_is_not_dropped(image: Path) -> None:
    """From before the first byte changes to when it is on the disk."""
    with running_kernel(image, memory_bytes=MEMORY_BYTES, page_states=True) as kernel:
        fill_floor(kernel)
        write_file(kernel, "/f", b"old!" * (20 * PAGE // 4))
        kernel.vfs.sync()
        handle = kernel.vfs.open("/f", 2)
        kernel.vfs.pwrite(handle, b"new!" * (PAGE // 2), 5 * PAGE + 8)
        kernel.vfs.close(handle)
        check_states(kernel)
        assert drop_all(kernel) == 17
        check_states(kernel)
        allow(kernel, 1 << 30)
        handle = kernel.vfs.open("/f", 2)
        # Over a page that was dropped, whole and in part.
        kernel.vfs.pwrite(handle, b"n" * (PAGE + 3), 9 * PAGE)
        kernel.vfs.close(handle)
        check_states(kernel)
        wanted = bytearray(b"old!" * (20 * PAGE // 4))
        wanted[5 * PAGE + 8 : 7 * PAGE + 8] = b"new!" * (PAGE // 2)
        wanted[9 * PAGE : 10 * PAGE + 3] = b"n" * (PAGE + 3)
        assert read_file(kernel, "/f") == wanted


def test_unused_frames_go_first_and_the_least_used_pages_next(image: Path) -> None:
    """And a page that was used again and again last."""
    with running_kernel(image, memory_bytes=MEMORY_BYTES, page_states=True) as kernel:
        fill_floor(kernel)
        for name in ("/often", "/once"):
            write_file(kernel, name, name.encode() * 4 * PAGE)
        kernel.vfs.sync()
        for _ in range(3):
            read_file(kernel, "/often", 0, 4 * PAGE)
        states = kernel.memory.states
        assert states is not None
        volatile = states.count(VOLATILE)
        free = kernel.memory.resident_free_pages
        allow(kernel, kernel.userland.balloon.size_pages - free)
        assert states.count(VOLATILE) == volatile
        assert kernel.memory.resident_free_pages == 0
        allow(kernel, kernel.userland.balloon.size_pages - 15)
        assert states.count(DISCARDED) == 15
        faults = states.discard_faults
        assert read_file(kernel, "/often", 0, 4 * PAGE) == (b"/often" * 4 * PAGE)[: 4 * PAGE]
        assert states.discard_faults == faults


def test_frames_come_back_when_they_are_needed_and_within_what_is_allowed(
    image: Path, tmp_path: Path
) -> None:
    """Not before.  What does not fit is swapped by the guest itself, and nobody is killed."""
    swap = swap_file(tmp_path)
    with running_kernel(image, memory_bytes=MEMORY_BYTES, page_states=True, swap=swap) as kernel:
        small = allow(kernel, 0)
        assert small == kernel.userland.balloon.floor_pages
        assert kernel.userland.balloon.size_pages == small
        process = kernel.userland.processes.spawn("program")
        address = process.map(PROGRAM_PAGES * PAGE)
        content = random.Random(2).randbytes(PROGRAM_PAGES * PAGE)
        process.write(address, content)
        assert kernel.userland.balloon.size_pages == small
        swapped = kernel.counters()["swap"]["out_pages"]
        assert swapped >= PROGRAM_PAGES - FRAMES_MIN
        allow(kernel, small + 2 * PROGRAM_PAGES)
        assert kernel.userland.balloon.size_pages == small
        assert process.read(address, PROGRAM_PAGES * PAGE) == content
        assert small < kernel.userland.balloon.size_pages < small + PROGRAM_PAGES
        assert kernel.counters()["swap"]["out_pages"] == swapped
        check_states(kernel)
        check_programs(kernel)

        # All is stable now: the guest has to evict, a batch at each step.
        allow(kernel, small)
        for _ in range(10):
            kernel.idle()
        assert kernel.userland.balloon.size_pages == small
        assert process.read(address, PROGRAM_PAGES * PAGE) == content
        assert not kernel.userland.processes.kills


class Host(LocalHypervisor):
    """A hypervisor that lends, of so many frames."""

    def __init__(self, frames: int) -> None:
        super().__init__(layout(frames).end, lends=True)

    @property
    def lent(self) -> int:
        """Pages that the guest was lent."""
        return len(self.machine.clients["guest"].lent)


def test_frames_are_borrowed_when_they_are_needed_and_go_back_when_they_are_not(
    image: Path, tmp_path: Path
) -> None:
    """In batches; when the host has none the guest has to do with what it has."""
    host = Host(MEMORY_BYTES // PAGE - 60)
    with running_kernel(
        image,
        host,
        memory_bytes=MEMORY_BYTES,
        page_states=True,
        cleancache=False,
        frontswap=False,
        swap=swap_file(tmp_path),
    ) as kernel:
        balloon = kernel.userland.balloon
        assert host.lent == balloon.size_pages == balloon.floor_pages
        process = kernel.userland.processes.spawn("program")
        address = process.map(200 * PAGE)
        process.write(address, b"a" * (FRAMES_MIN + 10) * PAGE)
        assert balloon.floor_pages + 10 <= balloon.size_pages <= host.lent
        assert host.lent <= balloon.floor_pages + 10 + 2 * GROW_PAGES
        assert kernel.counters()["swap"]["out_pages"] == 0

        process.write(address, b"b" * 200 * PAGE)
        assert host.lent == balloon.size_pages == MEMORY_BYTES // PAGE - 60
        assert kernel.counters()["swap"]["out_pages"] > 0
        check_states(kernel)

        # The host is short of nothing and asks for nothing.
        process.exit()
        kernel.idle()
        assert kernel.memory.resident_free_pages == GROW_PAGES
        assert host.lent == balloon.size_pages == balloon.floor_pages - FRAMES_MIN + GROW_PAGES
        check_states(kernel)
        host.check()


def test_what_could_be_taken_can_be_taken_after_an_attach(
    image: Path, expect_warning: Callable[[str], None]
) -> None:
    """Somebody may have made sure of it a moment ago."""
    expect_warning("tmem event=disconnected")
    time, host = Time(), Host(MEMORY_BYTES // PAGE)
    with running_kernel(
        image, host, time=time, memory_bytes=MEMORY_BYTES, page_states=True, frontswap=False
    ) as kernel:
        kernel.memory.reclaim.make_room(FRAMES_MIN + 5)
        claimable = kernel.memory.claimable_pages
        assert claimable >= 5
        assert kernel.attachment is not None
        assert kernel.attachment.calls is not None
        kernel.attachment.lose(kernel.attachment.calls)
        time.seconds += RETRY_SECONDS
        kernel.attachment.attach()
        assert kernel.memory.claimable_pages == claimable
        assert host.lent == kernel.userland.balloon.size_pages + claimable


def test_what_is_dropped_can_be_lent_to_another(image: Path) -> None:
    """The target says how much; the rest the host has at once."""
    host = Host(MEMORY_BYTES // PAGE)
    with running_kernel(
        image, host, memory_bytes=MEMORY_BYTES, page_states=True, cleancache=False, frontswap=False
    ) as kernel:
        write_file(kernel, "/f", b"file" * (150 * PAGE // 4))
        kernel.vfs.sync()
        before = kernel.userland.balloon.size_pages
        assert host.lent >= before > 150
        told = allow(kernel, before - 60)
        assert host.lent == kernel.userland.balloon.size_pages == told
        assert kernel.counters()["page_states"]["dropped_volatile_pages"] > 0
        check_states(kernel)
        assert read_file(kernel, "/f") == b"file" * (150 * PAGE // 4)
        assert host.lent <= told


class StatesWorld(World):
    """Files and a program, while the host takes and gives."""

    def __init__(self, kernel: Kernel, hypervisor: LocalHypervisor, time: Time, seed: int) -> None:
        super().__init__(kernel, hypervisor, time, seed)
        self.program: Process = kernel.userland.processes.spawn("program")
        self.address = self.program.map(PROGRAM_PAGES * PAGE)
        self.memory = bytearray(PROGRAM_PAGES * PAGE)

    def step(self) -> None:
        rng = self.random
        choice = rng.random()
        if choice < 0.3:
            balloon = self.kernel.userland.balloon
            used = balloon.size_pages - self.kernel.memory.resident_free_pages
            any_size = rng.randrange(balloon.floor_pages - 20, balloon.maximum_pages + 20)
            allow(self.kernel, rng.choice((any_size, used - rng.randrange(40), 1 << 30)))
        elif choice < 0.4:
            self.kernel.idle()
        elif choice < 0.5:
            at = rng.randrange(PROGRAM_PAGES) * PAGE
            data = rng.randbytes(min(20 * PAGE, len(self.memory) - at))
            self.program.write(self.address + at, data)
            self.memory[at : at + len(data)] = data
        elif choice < 0.55:
            assert self.program.read(self.address, len(self.memory)) == self.memory
        elif choice < 0.6 and self.files:
            name = rng.choice(sorted(self.files))
            fs = self.kernel.fs
            self.kernel.pages.invalidate(fs.lookup(fs.root, name[1:].encode()))
        else:
            super().step()


@pytest.mark.parametrize("lends", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_states_are_in_step_whatever_is_done(
    tmp_path: Path, expect_warning: Callable[[str], None], seed: int, lends: bool
) -> None:
    """Random histories of files, a program, a hypervisor that dies and a host that is short."""
    expect_warning("(tmem|cleancache|frontswap) event=")
    image = make_image(tmp_path / "image", mib=4)
    time = Time()
    hypervisor = Host(MEMORY_BYTES // PAGE - 30) if lends else LocalHypervisor(1 << 20)
    with running_kernel(
        image,
        hypervisor,
        time=time,
        memory_bytes=MEMORY_BYTES,
        page_states=True,
        swap=swap_file(tmp_path),
        frontswap=False,
    ) as kernel:
        world = StatesWorld(kernel, hypervisor, time, seed)
        balloon = kernel.userland.balloon
        for _ in range(300):
            size = balloon.size_pages
            world.step()
            assert balloon.size_pages <= max(size, balloon.target_pages), "more than is allowed"
            if isinstance(hypervisor, Host) and hypervisor.is_up and not hypervisor._crashed:
                held = balloon.size_pages + kernel.memory.claimable_pages
                assert held <= hypervisor.lent, "more than was lent"
            check_pages(kernel.pages)
            check_states(kernel)
        check_programs(kernel)
        world.check_all()
        figures = kernel.counters()["page_states"]
        assert figures["dropped_unused_pages"] > 0
        world.trouble = 0.0
        hypervisor.kill()
        world.check_all()
        hypervisor.start()
        world.time.seconds += 10
        world.check_all()
        kernel.idle()
        hypervisor.check()
        assert world.program.read(world.address, len(world.memory)) == world.memory
        assert not kernel.userland.processes.kills
    assert_clean(image)
    with running_kernel(image) as kernel:
        world.kernel = kernel
        world.check_all()
