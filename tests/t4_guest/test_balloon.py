"""RAM that goes back to the host, and what a guest decides by itself about it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from guests.memory import FRAMES_MIN
from guests.selfballoon import Knobs, Needs, SelfBalloon, floor_pages, goal_pages, next_target
from ipc.abi import PAGE_BYTES
from tests.t4_guest.test_processes import swap_file
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

MIB = 1 << 20
PAGES = MIB // PAGE_BYTES


def resident_pages() -> int:
    """Of this process, as the host has it."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_pages_go_back_to_the_host_and_come_again(image: Path, tmp_path: Path) -> None:
    """The process gets smaller by what the balloon took; content is kept; zeros come back."""
    with running_kernel(image, memory_bytes=16 * MIB, swap=swap_file(tmp_path, 6000)) as kernel:
        userland = kernel.userland
        process = userland.processes.spawn("program")
        pages = kernel.memory.budget.frames
        address = process.map(pages * PAGE)
        process.write(address, b"x" * pages * PAGE)
        write_file(kernel, "/f", b"file" * PAGE)
        before = resident_pages()

        userland.balloon.set_target(8 * PAGES)
        while not userland.balloon.is_there:
            assert userland.balloon.step() > 0
        given = kernel.memory.given_back_pages
        assert given == 8 * PAGES
        assert before - resident_pages() > 0.9 * given
        check_programs(kernel)
        check_pages(kernel.pages)

        userland.balloon.set_target(1 << 40)
        while not userland.balloon.is_there:
            assert userland.balloon.step() > 0
        assert userland.balloon.size_pages == userland.balloon.maximum_pages == 16 * PAGES
        assert process.read(address, pages * PAGE) == b"x" * pages * PAGE
        assert read_file(kernel, "/f") == b"file" * PAGE
        check_programs(kernel)


def test_an_idle_guest_does_not_take_a_batch_a_look(image: Path) -> None:
    """It looks twice a second, and would be minutes on its way."""
    with running_kernel(image, memory_bytes=16 * MIB) as kernel:
        balloon = kernel.userland.balloon
        for target in (8 * PAGES, 16 * PAGES):
            balloon.set_target(target)
            kernel.idle()
            assert balloon.size_pages == target


def test_a_balloon_kills_nobody(image: Path) -> None:
    """Without swap a program's memory can't go: the guest stays as large as it needs to be."""
    with running_kernel(image) as kernel:
        userland = kernel.userland
        process = userland.processes.spawn("program")
        address = process.map((FRAMES_MIN - 10) * PAGE)
        process.write(address, b"y" * (FRAMES_MIN - 10) * PAGE)
        assert userland.balloon.set_target(1) == userland.balloon.floor_pages
        for _ in range(5):
            userland.balloon.step()
        assert not userland.balloon.size_pages < userland.balloon.floor_pages
        assert process.read(address, 10) == b"y" * 10
        assert not userland.processes.kills


@pytest.mark.parametrize("uses_tmem", [True, False])
def test_the_hypervisor_wishes_a_size(
    image: Path, hypervisor: LocalHypervisor, uses_tmem: bool
) -> None:
    """Through the window's shared info page; no wish any more is the full size."""
    with running_kernel(
        image, hypervisor, memory_bytes=2 * MIB, cleancache=uses_tmem, frontswap=uses_tmem
    ) as kernel:
        assert kernel.attachment is not None
        assert kernel.attachment.calls is not None
        window = kernel.attachment.calls.channel.window
        wished = kernel.userland.balloon.floor_pages + 100
        window.notify(1, balloon_target_pages=wished, writeback_pages=0)
        for _ in range(20):
            kernel.idle()
        assert kernel.counters()["balloon"]["size_pages"] == wished
        window.notify(2, balloon_target_pages=0, writeback_pages=0)
        for _ in range(20):
            kernel.idle()
        assert kernel.counters()["balloon"]["size_pages"] == 2 * PAGES


def test_the_hypervisor_wishes_pages_back(
    image: Path, hypervisor: LocalHypervisor, tmp_path: Path
) -> None:
    """Those that are in tmem for the longest go to the disk, as many as it asked for, once."""
    with running_kernel(image, hypervisor, swap=swap_file(tmp_path)) as kernel:
        process = kernel.userland.processes.spawn("program")
        address = process.map(200 * PAGE)
        content = random.Random(1).randbytes(200 * PAGE)
        process.write(address, content)
        before = kernel.counters()["frontswap"]["curr_pages"]
        assert before > 100
        assert kernel.attachment is not None
        assert kernel.attachment.calls is not None
        window = kernel.attachment.calls.channel.window
        window.notify(1, balloon_target_pages=0, writeback_pages=70)
        for _ in range(20):
            kernel.idle()
        counters = kernel.counters()
        assert counters["swap"]["written_back_pages"] == 70
        assert counters["frontswap"]["curr_pages"] == before - 70
        assert process.read(address, 200 * PAGE) == content
        check_programs(kernel)


@pytest.mark.parametrize(
    ("usable_mb", "floor_mb"),
    [(15, 15), (16, 16), (40, 28), (64, 43), (200, 60), (515, 112), (4195, 227)],
)
def test_floors(usable_mb: int, floor_mb: int) -> None:
    """By hand, from the table in xen-selfballoon.c; what is reserved comes on top."""
    reserved = 3 * PAGES
    needs = Needs(0, usable_mb * PAGES + reserved, 0, reserved, 0)
    assert floor_pages(needs, Knobs()) == floor_mb * PAGES + reserved


def test_targets() -> None:
    """Down slowly, up at once; frontswap's pages count when they are to come back."""
    knobs = Knobs(min_usable_mb=1)
    needs = Needs(
        size=80 * PAGES, maximum=100 * PAGES, committed=8 * PAGES, reserved=0, frontswap=7
    )
    assert goal_pages(needs, knobs) == 8 * PAGES
    assert next_target(needs, knobs) == 80 * PAGES - 72 * PAGES // 8
    knobs.set("downhysteresis", 1)
    assert next_target(needs, knobs) == 8 * PAGES
    knobs.set("reserved_mb", 100)
    assert next_target(needs, knobs) == 100 * PAGES
    knobs.set("uphysteresis", 4)
    assert next_target(needs, knobs) == 80 * PAGES + 7 * PAGES
    knobs.set("frontswap_selfshrinking", 1)
    assert goal_pages(needs, knobs) == 108 * PAGES + 7
    for name, value in (("interval", 0), ("selfballooning", 2), ("mb_bytes", 1), ("size", 1)):
        with pytest.raises(ValueError, match=name):
            knobs.set(name, value)


@pytest.mark.parametrize(
    ("committed_mb", "gain_percent", "goal_mb"),
    [(90, 250, 90), (130, 100, 130), (130, 250, 80), (175, 250, 50), (400, 250, -100)],
)
def test_ram_that_is_worth_more_in_tmem_goes_there(
    committed_mb: int, gain_percent: int, goal_mb: int
) -> None:
    """When programs want more than all RAM: 80 MB of RAM and 20 that hold 50 are 130."""
    knobs = Knobs(min_usable_mb=10, downhysteresis=1)
    knobs.set("frontswap_gain_percent", gain_percent)
    needs = Needs(100 * PAGES, 100 * PAGES, committed_mb * PAGES, 0, 5 * PAGES)
    assert goal_pages(needs, knobs) == goal_mb * PAGES
    assert next_target(needs, knobs) == max(10, min(100, goal_mb)) * PAGES
    with pytest.raises(ValueError, match="gain"):
        knobs.set("frontswap_gain_percent", 99)


def test_frontswap_is_shrunk_when_it_has_not_grown_for_a_while() -> None:
    """Inertia rounds of waiting, then one part in twenty a round, then what is left."""
    time, pages, shrunk = Time(), [400], []

    def needs() -> Needs:
        return Needs(10, 10, 0, 0, pages[0])

    def shrink(target: int) -> None:
        shrunk.append(target)
        pages[0] = target

    service = SelfBalloon(time.now_seconds, needs, lambda target: target, shrink)
    service.knobs.set("frontswap_selfshrinking", 1)
    for _ in range(5):
        time.seconds += service.knobs.interval
        service.step()
        service.step()
    # Seen to grow in the first round, then looked at three times.
    assert shrunk == [380, 361]
    pages[0] = 20
    time.seconds += service.knobs.interval
    service.step()
    assert shrunk[-1] == 0


def test_a_guest_that_balloons_itself(image: Path, hypervisor: LocalHypervisor) -> None:
    """Page cache goes to the host and to tmem; a program that needs memory gets it back."""
    time = Time()
    content = random.Random(2).randbytes(600 * PAGE)
    with running_kernel(image, hypervisor, time=time, memory_bytes=8 * MIB) as kernel:
        userland = kernel.userland
        write_file(kernel, "/f", content)
        kernel.vfs.sync()
        full = kernel.memory.budget.total
        for name, value in (("mb_bytes", 1 << 14), ("downhysteresis", 2), ("selfballooning", 1)):
            userland.switch_selfballooning(name, value)
        for _ in range(60):
            time.seconds += 5
            kernel.idle()
        small = userland.balloon.size_pages
        assert small < full // 2
        assert read_file(kernel, "/f") == content
        process = userland.processes.spawn("program")
        process.map(1000 * PAGE)
        for _ in range(40):
            time.seconds += 5
            kernel.idle()
        assert userland.balloon.size_pages == 1000 + full - kernel.memory.budget.frames
        userland.switch_selfballooning("selfballooning", 0)
        for _ in range(40):
            kernel.idle()
        assert userland.balloon.size_pages == full
