"""frontswap's modes, who is killed for memory, and pressure: one by one, by hand."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from guests.attachment import RETRY_SECONDS
from guests.kernel import Kernel
from guests.pressure import PERIOD_NS, Pressure
from guests.proc import virtual_file
from guests.process import OOM_SCORE_ADJ_MIN, Process, ProcessKilled
from guests.shell import Execution, Result
from guests.swap import READAHEAD_PAGES_MAX
from ipc.local import Fault
from tests.t4_guest.test_processes import swap_file
from tests.t4_guest.worlds import (
    PAGE,
    LocalHypervisor,
    Time,
    check_programs,
    running_kernel,
)

PAGES = 150


@pytest.fixture
def time() -> Time:
    """A clock that the test moves."""
    return Time()


@pytest.fixture
def kernel(
    image: Path, tmp_path: Path, hypervisor: LocalHypervisor, time: Time
) -> Iterator[Kernel]:
    """A guest with a swap disk and a hypervisor."""
    with running_kernel(image, hypervisor, time=time, swap=swap_file(tmp_path)) as running:
        yield running


def content(page: int) -> bytes:
    """What page n of a program holds."""
    return page.to_bytes(4, "little") * (PAGE // 4)


def fill(kernel: Kernel, pages: int = PAGES, name: str = "program") -> tuple[Process, int]:
    """A program that has written so many pages."""
    process = kernel.userland.processes.spawn(name)
    address = process.map(pages * PAGE)
    for page in range(pages):
        process.write(address + page * PAGE, content(page))
    return process, address


def read_all(process: Process, address: int, pages: int = PAGES) -> None:
    """All of it is right."""
    for page in range(pages):
        assert process.read(address + page * PAGE, PAGE) == content(page)


def test_a_page_that_comes_back_leaves_tmem(kernel: Kernel, hypervisor: LocalHypervisor) -> None:
    """And the disk has not seen it."""
    process, address = fill(kernel)
    stored = kernel.counters()["frontswap"]["curr_pages"]
    assert stored > PAGES // 2
    read_all(process, address)
    counters = kernel.counters()
    assert counters["frontswap"]["loads"] >= stored
    assert counters["swap"]["in_pages"] == counters["swap"]["out_pages"] == 0
    process.exit()
    kernel.idle()
    assert not hypervisor.persistent_slots()
    check_programs(kernel, hypervisor)


def test_a_window_whose_pages_go_to_the_disk_while_it_is_fetched(
    kernel: Kernel, hypervisor: LocalHypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for pages that are read ahead may be made by writing back some of those very pages."""
    swap, reclaim = kernel.userland.swap, kernel.memory.reclaim
    assert swap is not None
    process, address = fill(kernel)
    make_room, calls = reclaim.make_room, count()

    def make_room_and_write_back(pages: int) -> None:
        make_room(pages)
        # Not each time, or there would soon be nothing left to be written back.
        if next(calls) % 3 == 0:
            swap.write_back(1)

    monkeypatch.setattr(reclaim, "make_room", make_room_and_write_back)
    for _ in range(3):
        read_all(process, address)
    counters = kernel.counters()
    assert counters["frontswap"]["loads"] > 0
    assert counters["swap"]["in_pages"] > 0
    assert counters["anonymous"]["readahead_hits"] > 0
    check_programs(kernel, hypervisor)


def test_pages_may_stay_in_tmem(kernel: Kernel, hypervisor: LocalHypervisor) -> None:
    """Without exclusive loads a page that was only read goes again without a store."""
    assert kernel.userland.swap is not None
    kernel.userland.swap.exclusive = False
    process, address = fill(kernel)
    read_all(process, address)
    stores = kernel.counters()["frontswap"]["succ_stores"]
    read_all(process, address)
    read_all(process, address)
    assert kernel.counters()["frontswap"]["succ_stores"] <= stores + PAGES // 4
    check_programs(kernel, hypervisor)


def test_write_through(
    kernel: Kernel, hypervisor: LocalHypervisor, expect_warning: Callable[[str], None], time: Time
) -> None:
    """The disk has all pages, tmem saves the reads, and nobody minds when it loses them."""
    expect_warning("event=disconnected")
    assert kernel.userland.frontswap is not None
    kernel.userland.frontswap.writethrough = True
    process, address = fill(kernel)
    counters = kernel.counters()
    assert counters["swap"]["out_pages"] > PAGES // 2
    assert counters["frontswap"]["curr_pages"] == counters["swap"]["out_pages"]
    assert counters["frontswap"]["succ_stores"] == 0
    check_programs(kernel, hypervisor)
    for page in range(20):
        assert process.read(address + page * PAGE, PAGE) == content(page)
    assert kernel.counters()["swap"]["in_pages"] == 0
    hypervisor.kill(arena_lost=True)
    hypervisor.start()
    time.seconds += RETRY_SECONDS
    read_all(process, address)
    assert kernel.counters()["swap"]["in_pages"] > 0
    assert not kernel.userland.processes.kills


def test_shrinking_brings_pages_back_into_ram(kernel: Kernel, hypervisor: LocalHypervisor) -> None:
    """As far as frames are free; self-shrinking asks for it."""
    process, address = fill(kernel)
    other, _ = fill(kernel, 40, "other")
    other.exit()
    userland = kernel.userland
    free = kernel.memory.free_pages
    before = kernel.counters()["frontswap"]["curr_pages"]
    assert free > 20
    userland.switch_selfballooning("frontswap_selfshrinking", 1)
    userland.shrink_frontswap(before - 10)
    userland.idle()
    assert kernel.counters()["frontswap"]["curr_pages"] == before - 10
    evicted = kernel.counters()["anonymous"]["evictions"]
    userland.shrink_frontswap(0)
    assert kernel.memory.free_pages < READAHEAD_PAGES_MAX
    assert kernel.counters()["anonymous"]["evictions"] == evicted
    check_programs(kernel, hypervisor)
    read_all(process, address)


@pytest.mark.parametrize("fault", [Fault.LOSE_REQUEST, Fault.LOSE_REPLY])
def test_a_store_of_unknown_fate_is_on_the_disk(
    kernel: Kernel,
    hypervisor: LocalHypervisor,
    time: Time,
    fault: Fault,
    expect_warning: Callable[[str], None],
) -> None:
    """What tmem may have of it is flushed when the hypervisor is back, and never asked for."""
    expect_warning("event=disconnected")
    process, address = fill(kernel, 60)
    faults = iter([Fault.NONE, fault])
    hypervisor.draw_fault = lambda: next(faults, Fault.NONE)
    more = process.map(60 * PAGE)
    process.write(more, b"m" * 60 * PAGE)
    assert kernel.counters()["swap"]["out_pages"] > 0
    time.seconds += RETRY_SECONDS
    read_all(process, address, 60)
    assert process.read(more, 60 * PAGE) == b"m" * 60 * PAGE
    kernel.idle()
    check_programs(kernel, hypervisor)


@pytest.mark.parametrize("fault", [Fault.LOSE_REQUEST, Fault.LOSE_REPLY])
def test_a_hypervisor_that_dies_while_pages_are_written_back(
    kernel: Kernel,
    hypervisor: LocalHypervisor,
    time: Time,
    fault: Fault,
    expect_warning: Callable[[str], None],
) -> None:
    """The pages are read where they stand in the window, and the window is gone with the call that
    tells it that they are on the disk."""
    expect_warning("event=disconnected")
    process, address = fill(kernel)
    faults = iter([Fault.NONE, fault])
    hypervisor.draw_fault = lambda: next(faults, Fault.NONE)
    assert kernel.userland.swap is not None
    assert kernel.userland.swap.write_back(10) == 10
    assert next(faults, None) is None
    time.seconds += RETRY_SECONDS
    read_all(process, address)
    kernel.idle()
    check_programs(kernel, hypervisor)


def test_a_hypervisor_that_does_not_come_back(
    kernel: Kernel, hypervisor: LocalHypervisor, expect_warning: Callable[[str], None]
) -> None:
    """Whoever needs a page of it is killed after a minute; whoever doesn't lives."""
    expect_warning("event=(disconnected|not-attached|killed)")
    process, address = fill(kernel)
    assert process.table.swapped_pages > PAGES // 2
    hypervisor.kill()
    with pytest.raises(ProcessKilled, match="the hypervisor is away for 60 s"):
        read_all(process, address)
    survivor, own = fill(kernel, 100, "survivor")
    read_all(survivor, own, 100)
    assert kernel.counters()["swap"]["out_pages"] > 0
    check_programs(kernel)


def test_who_is_killed(
    image: Path, expect_warning: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    """The one that has most, unless the scores say otherwise; one is never taken."""
    expect_warning("event=killed why=Out of memory")
    caplog.set_level(logging.INFO, "guests.process")
    with running_kernel(image) as kernel:
        processes = kernel.userland.processes
        frames = kernel.memory.budget.frames
        big, _ = fill(kernel, frames // 3, "big")
        small, _ = fill(kernel, frames // 4, "small")
        holy, _ = fill(kernel, frames // 3 - 8, "holy")
        holy.oom_score_adj = OOM_SCORE_ADJ_MIN
        small.oom_score_adj = 500
        late, _ = fill(kernel, frames // 4, "late")
        assert [kill.name for kill in processes.kills] == ["small"]
        assert big.is_alive and holy.is_alive and late.is_alive
        assert str(processes.kills[0]) == (
            f"Out of memory: Killed process {small.pid} (small) "
            f"total-vm:{frames // 4 * 4}kB, anon-rss:{frames // 4 * 4}kB, file-rss:0kB, "
            "shmem-rss:0kB, UID:0 pgtables:4kB oom_score_adj:500 swapped:0kB"
        )
        lines = [
            one.message.removeprefix("oom ") for one in caplog.records if one.message[:4] == "oom "
        ]
        rows = [line.split() for line in lines if line.startswith("[      ")]
        assert [(row[-1], int(row[5]), int(row[-2])) for row in rows] == [
            ("big", frames // 3, 0),
            ("small", frames // 4, 500),
            ("holy", frames // 3 - 8, OOM_SCORE_ADJ_MIN),
            ("late", frames - sum(int(row[5]) for row in rows[:3]), 0),
        ]
        assert lines[-1].endswith(f"task=small,pid={small.pid},uid=0")
        for process in (big, late):
            process.oom_score_adj = OOM_SCORE_ADJ_MIN
        last = processes.spawn("last")
        last.oom_score_adj = OOM_SCORE_ADJ_MIN
        with pytest.raises(OSError, match="nobody can be killed") as failed:
            last.write(last.map(frames * PAGE), bytes(frames * PAGE))
        assert failed.value.errno == errno.ENOMEM
        assert last.is_alive


def test_programs_end_where_their_memory_does(kernel: Kernel) -> None:
    """EFAULT outside; what was unmapped is zeros when it is mapped again elsewhere."""
    process, address = fill(kernel, 10)
    for start, size in (
        (address - 1, 1),
        (address, 10 * PAGE + 1),
        (address + 10 * PAGE, 1),
        (0, 1),
    ):
        with pytest.raises(OSError, match="not mapped") as failed:
            process.read(start, size)
        assert failed.value.errno == errno.EFAULT
    process.unmap(address + 2 * PAGE, 3 * PAGE)
    with pytest.raises(OSError, match="not mapped"):
        process.write(address, b"x" * 3 * PAGE)
    assert process.read(address + PAGE, PAGE) == content(1)
    assert process.read(address + 5 * PAGE, PAGE) == content(5)
    assert process.maps.pages == 7 == kernel.userland.processes.committed_pages
    with pytest.raises(OSError, match="bytes") as failed:
        process.map(0)
    assert failed.value.errno == errno.EINVAL
    process.exit()
    with pytest.raises(ProcessKilled, match="has ended"):
        process.map(PAGE)


def test_pressure_is_averaged_as_linux_does() -> None:
    """Half of each period waited for: the averages go to one half, the shortest first."""
    now, alone = [0], [True]
    pressure = Pressure(lambda: now[0], lambda: not alone[0])
    for number in range(30):
        alone[0] = number % 2 == 0
        with pressure.stalled(), pressure.stalled():
            now[0] += PERIOD_NS // 2
        now[0] += PERIOD_NS // 2
        pressure.update()
    some, full = pressure.some, pressure.full
    assert some.total_ns == 30 * PERIOD_NS // 2
    assert full.total_ns == 15 * PERIOD_NS // 2
    # 1 - exp(-60 s / n), of one half.
    assert [round(one, 4) for one in some.averages] == [0.4988, 0.3161, 0.0906]
    assert full.averages[0] < some.averages[0]
    now[0] += 5 * PERIOD_NS
    pressure.update()
    assert round(some.averages[0], 4) == round(0.4988 * 0.3679, 4)
    assert pressure.text().splitlines()[0] == (
        f"some avg10={100 * some.averages[0]:.2f} avg60={100 * some.averages[1]:.2f} "
        f"avg300={100 * some.averages[2]:.2f} total=30000000"
    )


def test_linuxs_files(kernel: Kernel) -> None:
    """Sums that must agree, whoever counts them."""
    process, _ = fill(kernel)
    rows = {
        line.split(":")[0]: int(line.split()[1])
        for line in (virtual_file(kernel, "/proc/meminfo") or b"").decode().splitlines()
    }
    assert rows["Active"] == rows["Active(anon)"] + rows["Active(file)"]
    assert rows["AnonPages"] == rows["Active(anon)"] + rows["Inactive(anon)"]
    assert rows["Committed_AS"] == PAGES * 4
    used = process.table.swapped_pages
    assert rows["SwapTotal"] - rows["SwapFree"] == used * 4 + rows["SwapCached"]
    parts = ("MemFree", "Cached", "AnonPages", "Buffers", "Transfer", "TmemWindow")
    assert sum(rows[name] for name in parts) == rows["MemTotal"]
    assert rows["CommitLimit"] == rows["MemTotal"] // 2 + rows["SwapTotal"]
    swaps = (virtual_file(kernel, "/proc/swaps") or b"").decode().splitlines()[1].split()
    assert int(swaps[3]) == rows["SwapTotal"] - rows["SwapFree"]
    vmstat = dict(
        line.split() for line in (virtual_file(kernel, "/proc/vmstat") or b"").decode().splitlines()
    )
    assert int(vmstat["frontswap_stores"]) == kernel.counters()["frontswap"]["succ_stores"]
    assert virtual_file(kernel, "/sys/kernel/debug/frontswap/loads") == b"0\n"
    assert (virtual_file(kernel, "/proc/pressure/memory") or b"").startswith(b"some avg10=")


def meminfo(kernel: Kernel) -> list[str]:
    """Its lines."""
    return (virtual_file(kernel, "/proc/meminfo") or b"").decode().splitlines()


def test_meminfo_is_written_as_linux_writes_it(kernel: Kernel) -> None:
    """The same names in the same order, and the same columns; what a balloon has is not there."""
    host = [line for line in Path("/proc/meminfo").read_text().splitlines() if "kB" in line]
    for line in host + meminfo(kernel):
        name, value, _ = line.split()
        assert line == f"{name:16}{value:>8} kB"
    names = [line.split(":")[0] for line in meminfo(kernel)]
    hosts = [line.split(":")[0] for line in host]
    # Two are ours, and one is of young Linuxes.
    assert set(names) - set(hosts) <= {"Transfer", "TmemWindow", "Balloon"}
    common = [name for name in names if name in hosts]
    assert common == [name for name in hosts if name in common]

    def row(name: str) -> int:
        return next(int(line.split()[1]) for line in meminfo(kernel) if line.startswith(name))

    total, free = row("MemTotal:"), row("MemFree:")
    assert kernel.memory.give_back(5) == 5
    assert (row("MemTotal:"), row("MemFree:")) == (total - 20, free - 20)
    assert row("Balloon:") == 20


def test_modes_are_switched_by_a_command(kernel: Kernel, hypervisor: LocalHypervisor) -> None:
    """While pages are there; what makes no sense changes nothing."""

    def command(*words: str) -> Result:
        result = Execution(kernel, ["frontswap", *words]).step()
        assert result is not None
        return result

    process, address = fill(kernel)
    other, _ = fill(kernel, 60, "other")
    other.exit()
    before = kernel.counters()["frontswap"]["curr_pages"]
    assert command().stdout.decode() == f"writethrough 0\nexclusive_gets 1\ncurr_pages {before}\n"
    shown = command("writethrough", "1", "exclusive_gets", "0", "shrink", str(before - 5))
    assert shown.stdout.decode() == f"writethrough 1\nexclusive_gets 0\ncurr_pages {before - 5}\n"
    assert kernel.userland.frontswap is not None and kernel.userland.frontswap.writethrough
    assert kernel.userland.swap is not None and not kernel.userland.swap.exclusive
    for words in (
        ["writethrough", "2"],
        ["shrink"],
        ["shrink", "-1"],
        ["shrink", "9" * 5000],
        ["on"],
    ):
        assert command(*words).exit_code == 2
    assert command().stdout == shown.stdout
    read_all(process, address)
    check_programs(kernel, hypervisor)


def test_without_a_swap_disk_there_are_no_modes(image: Path) -> None:
    """And it is said why."""
    with running_kernel(image) as kernel:
        result = Execution(kernel, ["frontswap"]).step()
        assert result is not None and b"needs a swap disk and a hypervisor" in result.stderr
