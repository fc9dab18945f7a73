"""KSM beside tmem: what is switched and put back, what is counted, what the report says of it."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guests.ksm import make_mergeable
from ipc.errors import ExitCode, OperatorError
from tests.support.clusters import short_folder, wait_until
from tests.support.tools import need_tool
from tests.t6_tools.test_classic import TINY, Sweep, run_sweep
from tools.experiment import merging as merging_module
from tools.experiment.merging import SYSTEM, Merged, merging, together, why_not
from tools.units import PAGE_BYTES

PAGES = 400
NAMES = {"run": "0\n", "sleep_millisecs": "20\n", "pages_to_scan": "100\n"}


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A folder that looks like the kernel's."""
    for name, text in NAMES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def texts(system: Path) -> dict[str, str]:
    """What stands in its files."""
    return {name: (system / name).read_text() for name in NAMES}


def test_it_is_on_for_the_run_and_then_as_it_was(system: Path) -> None:
    """Also when the run fails; all of the RAM is looked at four times a second."""
    wanted = {"run": "1", "sleep_millisecs": "20", "pages_to_scan": str(round(3584 * 0.02 * 4))}

    def run() -> None:
        with merging(3584, system=system):
            assert texts(system) == wanted
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert texts(system) == NAMES


def test_two_runs_take_turns(system: Path) -> None:
    """The second would take what is set for the first for what was there before."""
    waits: list[float] = []
    with (system / "run").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def wait(seconds: float) -> None:
            waits.append(seconds)
            assert texts(system) == NAMES
            if len(waits) == 3:
                fcntl.flock(other, fcntl.LOCK_UN)

        with merging(100, wait, system):
            assert (system / "run").read_text() == "1"
    assert len(waits) == 3


def test_what_can_not_be_set_is_one_line(system: Path) -> None:
    """And what was set before it is put back."""
    (system / "pages_to_scan").unlink()
    (system / "pages_to_scan").mkdir()
    with pytest.raises(OSError, match="directory"), merging(100, system=system):
        pass
    (system / "pages_to_scan").rmdir()
    (system / "pages_to_scan").write_text("100\n")

    class Fails(type(Path())):  # type: ignore[misc]
        def write_text(self, data: str, *arguments: Any, **options: Any) -> int:
            if data == "1":
                raise OSError(22, "Invalid argument")
            return int(super().write_text(data, *arguments, **options))

    with pytest.raises(OperatorError, match=r"KSM: .*/run can't be set to 1 .*without --ksm") as no:
        with merging(100, system=Fails(system)):
            pass
    assert no.value.exit_code == ExitCode.UNAVAILABLE
    assert texts(system) == NAMES


def test_why_there_is_none(system: Path, tmp_path: Path) -> None:
    """No KSM, or no right to switch it."""
    assert why_not(system) is None
    assert texts(system) == NAMES
    assert why_not(tmp_path / "missing") == "not on this kernel"

    class ReadOnly(type(Path())):  # type: ignore[misc]
        def write_text(self, *_arguments: Any, **_options: Any) -> int:
            raise PermissionError(13, "Permission denied")

    line = why_not(ReadOnly(system))
    assert line is not None
    assert line.endswith("can't be written to (Permission denied); run it as root")


def test_means_and_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of guests together, over the looks; one that is dead has none."""
    looks = iter([(3, 100), (5, 300), (0, 0), (0, 4)])

    def figures(_pid: int) -> dict[str, int]:
        pages, profit = next(looks)
        return {"merged_pages": pages, "profit_bytes": profit}

    cpu = iter([1.5, 1.75])
    monkeypatch.setattr(merging_module, "figures", figures)
    monkeypatch.setattr(merging_module, "_ksmd_cpu_seconds", lambda: next(cpu))
    merged = Merged()
    merged.look({"one": 1, "two": 2, "dead": None})
    merged.look({"one": 1, "two": 2})
    found = merged.record()
    assert found == {
        "looks": 2,
        "merged_pages": 4,
        "merged_pages_most": 8,
        "profit_bytes": 202,
        "profit_bytes_most": 400,
        "ksmd_cpu_seconds": 0.25,
    }
    runs = [{"ksm": found, "seconds": 2.0}, {"ksm": found | {"merged_pages": 6}, "seconds": 4.0}]
    sums = together(runs, 64 * PAGE_BYTES)
    assert (sums["merged_pages"], sums["ram_pages"], sums["seconds"]) == (5, 64, 3.0)
    assert sums["ksmd_cpu_seconds"] == 0.25
    runs[0]["ksm"] = found | {"ksmd_cpu_seconds": None}
    assert together(runs, 64 * PAGE_BYTES)["ksmd_cpu_seconds"] is None


def test_pages_that_the_kernel_merges_are_counted() -> None:
    """Real ones, of this process; ksmd's time too, where it is seen."""
    if (reason := why_not()) is not None:
        pytest.skip(f"KSM: {reason}")
    before = {name: (SYSTEM / name).read_text() for name in ("run", "pages_to_scan")}
    with mmap.mmap(-1, PAGES * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as ram:
        assert make_mergeable(ram)
        ram[:] = bytes(range(1, 129)) * 32 * PAGES
        with merging(PAGES):
            merged = Merged()

            def seen() -> bool:
                merged.look({"here": os.getpid()})
                record = merged.record()
                # The kernel brings a running thread's time up to date at its ticks only.
                counted = record["ksmd_cpu_seconds"] is None or record["ksmd_cpu_seconds"] > 0
                return counted and bool(record["merged_pages_most"] > PAGES // 2)

            wait_until(seen, "merged pages, and ksmd's time")
            found = merged.record()
        assert found["profit_bytes_most"] > PAGES // 4 * PAGE_BYTES
        assert ram[:] == bytes(range(1, 129)) * 32 * PAGES
    assert {name: (SYSTEM / name).read_text() for name in before} == before


@pytest.fixture(scope="module")
def sweep(new_cluster_name: Any) -> Iterator[Sweep]:
    """Tmem under pressure, with and without KSM."""
    need_tool("mke2fs")
    with short_folder() as folder:
        plan = replace(TINY, jobs=(8,), tree_bytes=48 << 10, modes=("tmem",))
        yield run_sweep(folder, plan, new_cluster_name(), "--ksm")


@pytest.mark.cluster
def test_tmem_saves_the_same_with_it(sweep: Sweep) -> None:
    """The heaviest level has the mode, with what was merged; without KSM it says why."""
    assert sweep.code == ExitCode.OK, sweep.errors
    found = sweep.found["ksm"]
    modes = [point["mode"] for point in sweep.found["points"]]
    report = (sweep.folder / "out" / "report.md").read_text()
    html = (sweep.folder / "out" / "report.html").read_text()
    if found["why_not"] is not None:
        assert modes == ["tmem"]
        assert f"not measured: {found['why_not']}" in report
        return
    assert modes == ["tmem", "tmem+ksm"]
    assert found["ram_pages"] == 6 * 2**20 // 2 // PAGE_BYTES
    run = next(run for run in sweep.found["runs"] if run["mode"] == "tmem+ksm")
    assert run["ksm"]["looks"] > 0
    assert run["mismatches"] == 0
    assert sweep.point("tmem", 8)["disk_reads_pages"] == run["disk_reads_pages"]
    for text in (report, html):
        assert "Same-page merging by the host" in text
        assert f"of {found['ram_pages']:,} pages of the guests" in text.replace("&#x27;", "'")
