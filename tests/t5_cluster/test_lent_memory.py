"""One memory for RAM and tmem, between real processes: `lend = true`."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.codec import Record
from ipc.segment import allocated_bytes
from tests.support.clusters import left_behind, tmem, tmem_here, wait_until, write_tree
from tools.control import ask
from tools.image import hash_file
from tools.rundir import ClusterDirectory

pytestmark = pytest.mark.cluster

ALPHA_PAGES, BRAVO_PAGES = 1024, 512
SMALL_PAGES = 624
GIVEN_PAGES = ALPHA_PAGES - SMALL_PAGES
MOST = 0.7
"""Of the pages that go: an interpreter's own memory comes and goes meanwhile."""


class Pair:
    """Two guests that are up."""

    def __init__(self, folder: Path) -> None:
        (path,) = (folder / "runs").glob("*/on")
        self._folder = folder
        self._directory = ClusterDirectory(path)
        self._segment = (path / "arena").read_text().strip()

    def ask(self, guest: str, verb: str, **fields: object) -> Record:
        """Over the guest's control socket."""
        return ask(self._directory.guest_socket(guest), {"verb": verb, **fields})

    def run(self, guest: str, workload: str, **parameters: object) -> Any:
        """A workload from its begin to its end; the guest's figures then."""
        question = {"workload": workload, "seed": 1, "parameters": parameters}
        assert self.ask(guest, "run", **question) == {"accepted": True}
        wait_until(lambda: self.ask(guest, "status")["state"] == "idle", f"{workload} is done")
        return self.ask(guest, "status")["counters"]

    def read(self, guest: str) -> None:
        """All files of the tree, and compare them with what they were made of."""
        manifest = self._folder / "manifest.json"
        if not manifest.exists():
            tree = self._folder / "tree"
            files = [path for path in tree.rglob("*") if path.is_file()]
            hashes = {f"{path.relative_to(tree)}": hash_file(path) for path in files}
            manifest.write_text(json.dumps(hashes))
        assert self.run(guest, "read_all", manifest=str(manifest))["mismatches"] == 0

    def listed(self) -> Any:
        """What `tmem list --json` says."""
        return json.loads(tmem_here("list", "--json", cwd=self._folder).stdout)

    def balloon(self, guest: str, pages: int) -> None:
        """`tmem balloon`, until the guest has that size."""
        assert tmem_here("balloon", guest, f"{pages * 4}K", cwd=self._folder).returncode == 0
        wait_until(
            lambda: self.ask(guest, "status")["counters"]["balloon"]["size_pages"] == pages,
            f"{guest} has {pages} pages",
        )

    def resident_pages(self, guest: str) -> int:
        """Of its process, as the host has it."""
        pid = self.listed()["guests"][guest]["pid"]
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])

    @property
    def arena_pages(self) -> int:
        """Memory that the segment has, as the host has it."""
        return allocated_bytes(self._segment) // 4096

    def kill_hypervisor(self) -> None:
        """And wait until the next one serves both."""
        rows = json.loads(tmem_here("ps", "--json", cwd=self._folder).stdout)
        (pid,) = [int(row["pid"]) for row in rows if row["name"] == "hypervisor"]
        os.kill(pid, signal.SIGKILL)

        def served() -> bool:
            done = tmem_here("list", "--json", cwd=self._folder)
            if done.returncode:
                return False
            guests = json.loads(done.stdout)["guests"].values()
            return len(guests) == 2 and all(guest["attached"] for guest in guests)

        wait_until(served, "a new hypervisor and both guests")


@pytest.fixture
def pair(folder: Path, cluster_name: str) -> Iterator[Pair]:
    """Guests of 4 and 2 MiB out of an arena of 7."""
    tree = write_tree(folder / "tree", files=200)
    lines = [f'name = "{cluster_name}"', "seed = 7", "[hypervisor]", 'arena = "7M"', "lend = true"]
    for name, memory in (("alpha", "4M"), ("bravo", "2M")):
        lines += ["[[guest]]", f'name = "{name}"', f'memory = "{memory}"', f'tree = "{tree}"']
    (folder / "cluster.toml").write_text("\n".join(lines) + "\n")
    done = tmem("up", "-d", "-f", "cluster.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    try:
        yield Pair(folder)
    finally:
        tmem("down", cwd=folder)
    assert left_behind(folder, cluster_name) == []


def lent(listed: Any) -> dict[str, int]:
    """Pages of RAM by guest."""
    return {name: guest["lent_pages"] for name, guest in listed["guests"].items()}


def test_what_alpha_gives_back_is_there_for_bravos_puts(pair: Pair, folder: Path) -> None:
    """In `tmem list`, in /proc and in the segment; and alpha gets it again."""
    listed = pair.listed()
    assert lent(listed) == {"alpha": ALPHA_PAGES, "bravo": BRAVO_PAGES}
    frames, free = listed["arena"]["frames"], listed["arena"]["free_frames"]
    assert free == frames - ALPHA_PAGES - BRAVO_PAGES
    text = tmem_here("list", cwd=folder).stdout
    assert "RAM" in text.splitlines()[0].split()
    (row,) = [line for line in text.splitlines() if line.startswith("alpha")]
    assert "4.0 MiB" in row
    assert f"{ALPHA_PAGES + BRAVO_PAGES:,} lent as RAM" in text

    pair.run("alpha", "programs", programs=1, pages=600, passes=1, forks=0)
    pair.read("bravo")
    before = pair.listed()
    held = before["guests"]["bravo"]["ephemeral_pages"]
    assert 0 < held <= free
    alpha_before, arena_before = pair.resident_pages("alpha"), pair.arena_pages

    pair.balloon("alpha", SMALL_PAGES)
    wait_until(lambda: lent(pair.listed())["alpha"] == SMALL_PAGES, "the hypervisor knows")
    assert alpha_before - pair.resident_pages("alpha") > MOST * GIVEN_PAGES
    pair.read("bravo")
    after = pair.listed()
    assert after["guests"]["bravo"]["ephemeral_pages"] > held + MOST * GIVEN_PAGES
    assert pair.arena_pages - arena_before > MOST * GIVEN_PAGES

    pair.kill_hypervisor()
    assert lent(pair.listed()) == {"alpha": SMALL_PAGES, "bravo": BRAVO_PAGES}

    arena_full = pair.arena_pages
    pair.balloon("alpha", ALPHA_PAGES)
    last = pair.listed()
    assert lent(last) == {"alpha": ALPHA_PAGES, "bravo": BRAVO_PAGES}
    assert last["guests"]["bravo"]["ephemeral_pages"] <= free
    assert arena_full - pair.arena_pages > MOST * GIVEN_PAGES
    for guest in ("alpha", "bravo"):
        pair.read(guest)
