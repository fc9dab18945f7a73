"""A real guest whose clean pages the host takes without asking: the host's memory, its files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import LiveGuests, left_behind, tmem, tmem_here, wait_until, write_tree

pytestmark = pytest.mark.cluster

FLOOR = "912K"
"""The parts of 8 MiB that are no frames, and 64 frames."""


class Guests(LiveGuests):
    """A cluster with the one guest `web`."""

    def read_all(self) -> None:
        """Read the tree and verify it."""
        (manifest,) = (self.folder / "runs/cache").glob("*.json")
        question = {"workload": "read_all", "seed": 1, "parameters": {"manifest": str(manifest)}}
        assert self.ask("web", "run", **question) == {"accepted": True}
        wait_until(lambda: self.ask("web", "status")["state"] == "idle", "the end of the work")

    @property
    def counters(self) -> Any:
        """Its figures."""
        return self.ask("web", "status")["counters"]

    @cached_property
    def pid(self) -> int:
        """Of its process."""
        return self.pids()["web"]

    @property
    def resident_pages(self) -> int:
        """Of its process, as the host has it."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])


@pytest.fixture
def guests(folder: Path, cluster_name: str) -> Iterator[Guests]:
    """A guest of 8 MiB with page states and no tmem to speak of."""
    tree = write_tree(folder / "tree", files=120)
    lines = [f'name = "{cluster_name}"', "[hypervisor]", 'arena = "512K"', "[[guest]]"]
    lines += ['name = "web"', 'memory = "8M"', "page_states = true", f'tree = "{tree}"']
    (folder / "cluster.toml").write_text("\n".join(lines) + "\n")
    done = tmem("up", "-d", "-f", "cluster.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    try:
        yield Guests(folder)
    finally:
        tmem("down", cwd=folder)
    assert left_behind(folder, cluster_name) == []


def test_the_host_takes_clean_pages_and_files_are_right_afterwards(
    guests: Guests, folder: Path
) -> None:
    """The process gets smaller by what was dropped; a guest that is asleep is no exception."""
    guests.read_all()
    before, resident = guests.counters, guests.resident_pages
    volatile = before["page_states"]["volatile_pages"]
    assert volatile > 200
    floor = before["balloon"]["floor_pages"]

    assert tmem_here("balloon", "web", FLOOR, cwd=folder).returncode == 0
    wait_until(lambda: guests.counters["balloon"]["size_pages"] == floor, "pages to be dropped")
    dropped = guests.counters["page_states"]["dropped_volatile_pages"]
    assert dropped > volatile / 2
    # Its interpreter's memory comes and goes, too.
    assert resident - guests.resident_pages > dropped / 2

    assert tmem_here("balloon", "web", "none", cwd=folder).returncode == 0
    guests.read_all()
    after = guests.counters
    assert after["mismatches"] == 0
    assert after["files_verified"] == 2 * before["files_verified"] > 0
    assert after["disk_reads_pages"] - before["disk_reads_pages"] > 0.8 * dropped
    told = tmem_here("exec", "web", "--", "cat", "/proc/vmstat", cwd=folder).stdout
    assert f"cmm_dropped_volatile_pages {dropped}\n" in told
