"""Real guests whose programs need more memory than there is, over swap files and a hypervisor."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import LiveGuests, left_behind, tmem, tmem_here, wait_until, write_tree

pytestmark = pytest.mark.cluster

MEMORY_PAGES = 2 * 256
FOUR_TIMES = {"programs": 4, "pages": MEMORY_PAGES, "passes": 1, "forks": 1}


class Guests(LiveGuests):
    """A cluster that is up."""

    def run(self, guest: str, seed: int, **parameters: object) -> None:
        """Begin the workload `programs`."""
        question = {"workload": "programs", "seed": seed, "parameters": parameters}
        assert self.ask(guest, "run", **question) == {"accepted": True}

    def state(self, guest: str) -> str:
        """What it does."""
        return str(self.ask(guest, "status")["state"])

    def counters(self, guest: str) -> Any:
        """Its figures."""
        return self.ask(guest, "status")["counters"]

    def kill_hypervisor(self) -> None:
        """And wait for the next one."""
        old = self.pids()["hypervisor"]
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: self.pids().get("hypervisor", old) != old, "a new hypervisor")

    def resident_pages(self, guest: str) -> int:
        """Of its process, as the host has it."""
        return int(Path(f"/proc/{self.pids()[guest]}/statm").read_text().split()[1])


@pytest.fixture
def guests(folder: Path, cluster_name: str) -> Iterator[Guests]:
    """Two guests of 2 MiB with swap files of 16, and one of 8 with 80, over an arena of 6 MiB."""
    tree = write_tree(folder / "tree", files=6)
    lines = [f'name = "{cluster_name}"', "seed = 7", "[hypervisor]", 'arena = "6M"']
    for name, memory, swap in (("red", "2M", "16M"), ("blue", "2M", "16M"), ("green", "8M", "80M")):
        lines += ["[[guest]]", f'name = "{name}"', f'memory = "{memory}"', f'swap = "{swap}"']
        lines += [f'tree = "{tree}"']
    (folder / "cluster.toml").write_text("\n".join(lines) + "\n")
    done = tmem("up", "-d", "-f", "cluster.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    try:
        yield Guests(folder)
    finally:
        tmem("down", cwd=folder)
    assert left_behind(folder, cluster_name) == []


def test_four_times_the_memory_is_read_back_right(guests: Guests) -> None:
    """Also when the hypervisor is killed again and again meanwhile."""
    for seed, guest in enumerate(("red", "blue")):
        guests.run(guest, seed, **FOUR_TIMES)
    kills = 0
    while "running" in (states := {guests.state(guest) for guest in ("red", "blue")}):
        assert states <= {"running", "idle"}
        if kills < 3:
            guests.kill_hypervisor()
            kills += 1
    for guest in ("red", "blue"):
        counters = guests.counters(guest)
        assert counters["mismatches"] == 0
        assert counters["anonymous"]["oom_kills"] == 0
        assert counters["anonymous"]["kills"] == []
        front, swap = counters["frontswap"], counters["swap"]
        assert front["succ_stores"] > MEMORY_PAGES
        assert front["loads"] > MEMORY_PAGES / 2
        assert front["lost"] == 0
        assert swap["out_pages"] > 0, "tmem alone has not room for all of it"
        assert swap["written_back_pages"] > 0
        assert swap["free_pages"] == swap["total_pages"]
    assert kills > 0

    # All programs have ended: their pages leave tmem, too.
    def persistent_pages() -> list[int]:
        listed = json.loads(tmem("list", "--json", cwd=guests.folder).stdout)
        return [guest["persistent_pages"] for guest in listed["guests"].values()]

    wait_until(lambda: not any(persistent_pages()), "no page left in tmem")

    shown = guests.ask("red", "exec", argv=["cat", "/proc/meminfo"])["stdout"].decode()
    rows = {line.split()[0]: int(line.split()[1]) for line in shown.splitlines()}
    assert rows["SwapTotal:"] == rows["SwapFree:"] == 16 * 1024 - 4
    assert rows["Committed_AS:"] == rows["AnonPages:"] == 0


def test_ram_goes_to_the_host_and_comes_back(guests: Guests) -> None:
    """The process gets smaller by what the balloon takes."""
    # A jail that allows less than the swap file has would have its slots retired, one by one.
    limits = Path(f"/proc/{guests.pids()['green']}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max file size"))
    assert line.split()[3] in ("unlimited", str(80 << 20))
    guests.run("green", 1, programs=1, pages=1900, passes=0)
    wait_until(lambda: guests.state("green") == "idle", "the end of the program")
    before = guests.resident_pages("green")
    assert tmem("balloon", "green", "2M", cwd=guests.folder).returncode == 0
    wait_until(lambda: guests.counters("green")["balloon"]["size_pages"] == 512, "the target")
    # The interpreter has a life of its own, of some hundred pages.
    assert before - guests.resident_pages("green") > 1000
    said = tmem_here("balloon", "green", "10K", cwd=guests.folder).stdout
    least = guests.counters("green")["balloon"]["floor_pages"]
    assert (
        said == f"green: balloon target 8.0 KiB; it keeps {least * 4:.1f} KiB, less it can't have\n"
    )
    said = tmem_here("balloon", "green", "9M", cwd=guests.folder).stdout
    assert said == "green: balloon target 9.0 MiB; it has 8.0 MiB at most\n"
    header, row = tmem_here("balloon", "green", cwd=guests.folder).stdout.splitlines()
    assert header.split() == ["NAME", "RAM", "TARGET", "LEAST", "MOST"]
    assert row.endswith(f"9.0 MiB  {least * 4:.1f} KiB  8.0 MiB")
    assert tmem("balloon", "green", "none", cwd=guests.folder).returncode == 0
    wait_until(lambda: guests.counters("green")["balloon"]["size_pages"] == 2048, "its full size")


def test_too_much_is_somebodys_end(guests: Guests) -> None:
    """More than RAM and swap: the out-of-memory killer takes one, the others and the guest live."""
    guests.run("red", 1, programs=5, pages=1000, passes=0)
    wait_until(lambda: guests.state("red") == "idle", "the end of the programs")
    counters = guests.counters("red")
    assert counters["mismatches"] == 0
    assert 0 < counters["anonymous"]["oom_kills"] < 5
    assert all("Out of memory: Killed process" in text for text in counters["anonymous"]["kills"])
    assert guests.ask("red", "exec", argv=["ls", "/"])["exit_code"] == 0
