"""tmem experiment moving, burst and oom: small ones with real guests, and their tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import ExitCode, OperatorError
from tests.support.clusters import short_folder, tmem_here
from tools.experiment import demand
from tools.experiment.classic import ACCESS_SECONDS, fresh_disks, prepare_images
from tools.experiment.demand import Demand, chosen_modes, table, went_wrong
from tools.experiment.modes import MODES
from tools.experiment.onerun import Work, running
from tools.interrupts import Interrupts
from tools.rundir import ClusterDirectory

TINY = Demand(guests=2, share_bytes=2 << 20, swap_bytes=8 << 20, tree_bytes=96 << 10)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, cluster_name: str) -> Iterator[Path]:
    """Where the experiments run, small ones."""
    monkeypatch.setattr(demand, "QUICK", replace(TINY, name=cluster_name))
    with short_folder() as path:
        yield path


def experiment(folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and document of one."""
    done = tmem_here("experiment", *words, "--quick", "--json", cwd=folder)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.cluster
def test_demand_that_moves_is_met_by_what_others_do_not_need(folder: Path) -> None:
    """Borrowed memory saves the swap disks most of what a fixed division costs them; RAM that the
    host takes from the others some of it."""
    code, found = experiment(folder, "moving", "--modes", "static,cmm2,tmem-borrow")
    assert code == ExitCode.OK
    assert [point["mode"] for point in found["points"]] == ["static", "cmm2", "tmem-borrow"]
    assert {point["mismatches"] for point in found["points"]} == {0}
    assert {point["oom_kills"] for point in found["points"]} == {0}
    swapped = [point["swap_in_pages"] + point["swap_out_pages"] for point in found["points"]]
    assert swapped[0] > 2 * swapped[2]
    assert swapped[1] < 0.8 * swapped[0]
    assert found["plan"]["total_bytes"] == 4 << 20
    assert not any((folder / "runs").glob("*/images")), "disks are gone"


@pytest.mark.cluster
def test_what_one_guest_has_read_makes_room_for_another(
    folder: Path, cluster_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With page states, while it sleeps; the host has lent all of its memory then, and no more."""
    monkeypatch.chdir(folder)
    host = replace(TINY, name=cluster_name).host
    reader, other = host.guests
    images = prepare_images(host, 1 << 20, folder / "cache")
    directory = ClusterDirectory(folder / "run")
    with (
        Interrupts() as interrupts,
        fresh_disks(TINY.swap_bytes, directory, images) as disks,
        running(MODES["cmm2"], host, disks, directory, interrupts, print) as run,
    ):
        manifest = {"manifest": str(images[reader].manifest)}
        read = run.result({reader: Work(1, manifest, "read_all")}, ACCESS_SECONDS)
        programs = {"programs": 1, "pages": 1000, "passes": 8}
        found = run.result({other: Work(1, programs, "programs")}, ACCESS_SECONDS)
        again = run.result({reader: Work(1, manifest, "read_all")}, ACCESS_SECONDS)
    assert read["errors"] == again["errors"] == []
    assert [one["mismatches"] for one in (read, found, again)] == [0, 0, 0]
    assert again["disk_reads_pages"] > read["disk_reads_pages"] / 2
    assert 0.9 * host.total_bytes < found["sizes_most_bytes"] <= host.total_bytes
    assert found["oom_kills"] == 0


@pytest.mark.cluster
def test_there_is_an_end_to_all_memory(folder: Path) -> None:
    """RAM and swap together, and somebody is killed for it; the experiment is no failure."""
    code, found = experiment(folder, "oom", "--modes", "static")
    assert code == ExitCode.OK
    (point,) = found["points"]
    assert point["oom_kills"] == 1
    assert point["mismatches"] == 0
    # 8 MiB of swap and less than 2 MiB of RAM.
    assert 7 << 20 < point["most_pages"] * 4096 < 10 << 20


def test_modes_and_what_people_see() -> None:
    """A row a mode, with the figures that there are; a line for each thing that is wrong."""
    assert chosen_modes("tmem, static") == ("tmem", "static")
    with pytest.raises(OperatorError, match="no mode 'fast'; there are static, balloon, cmm2"):
        chosen_modes("fast")
    point = {"mode": "static", "seconds": 1.5, "swap_in_pages": 1234, "errors": [], "mismatches": 0}
    found = {"points": [point, {**point, "mode": "tmem", "mismatches": 2, "errors": ["x died"]}]}
    assert table(found) == (
        ("mode", "seconds", "swap in"),
        [("static", "1.50", "1,234"), ("tmem", "1.50", "1,234")],
    )
    assert went_wrong(found) == ["tmem: x died", "tmem: 2 pages were not what was written"]
