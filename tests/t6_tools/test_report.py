"""The table, the summary and the verdict of a measured run, from numbers that one can check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import ExitCode
from tools.report import summary, table, verdict, write_results


def guest(reads: int, **others: Any) -> dict[str, Any]:
    """A guest's part of results.json."""
    return {
        "disk_reads_pages": reads,
        "disk_writes_pages": 1,
        "files_verified": 10,
        "bytes_verified": 1000,
        "mismatches": 0,
        "mismatch_paths": [],
        "seconds": 2.0,
        **others,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    """Two guests; red saves three quarters of its reads, blue none."""
    cleancache = {"succ_gets": 750, "failed_gets": 250, "puts": 1250, "invalidates": 0}
    nothing = dict.fromkeys(cleancache, 0)
    hypervisor = {"cpu_seconds": 0.5, "hypercalls": 9, "pages_put": 1250, "pages_got": 750}
    return {
        "seed": 1,
        "off": {
            "total_memory_bytes": 2**20,
            "guests": {"red": guest(1024), "blue": guest(100)},
            "hypervisor": dict.fromkeys([*hypervisor, "evictions"], 0),
            "errors": [],
        },
        "on": {
            "total_memory_bytes": 2**20,
            "guests": {
                "red": guest(256, cleancache=cleancache, hypervisor={"cpu_ns": 4_000_000}),
                "blue": guest(100, cleancache=nothing, hypervisor={"cpu_ns": 0}),
            },
            "hypervisor": hypervisor | {"evictions": 3},
            "errors": [],
        },
    }


def test_table_has_the_figures_of_each_guest(results: dict[str, Any]) -> None:
    """768 pages saved in 2 s are 1.5 MiB/s; 4 ms for 2000 pages are 2 us a page."""
    red, blue, everybody = table(results)

    assert red == ("red", "1,024", "256", "75.0%", "75.0%", "1,250", "2.00", "0.2%", "1.5 MiB/s")
    assert blue == ("blue", "100", "100", "0.0%", "-", "0", "-", "0.0%", "0 B/s")
    assert everybody[:4] == ("all", "1,124", "356", "68.3%")


def test_reads_that_grew_are_shown_as_a_loss(results: dict[str, Any]) -> None:
    """Nothing is hidden when tmem makes it worse."""
    results["on"]["guests"]["blue"]["disk_reads_pages"] = 150

    assert table(results)[1][3] == "-50.0%"
    assert table(results)[1][8] == "-100.0 KiB/s"


def test_summary_says_what_was_compared(results: dict[str, Any]) -> None:
    """Memory of both runs, verified bytes, the hypervisor's work."""
    lines = summary(results)

    assert "1.0 MiB on, 1.0 MiB off" in lines[0]
    assert lines[1] == "verified 40 files, 3.9 KiB; mismatches 0"
    assert "1,250 pages put, 750 got, 3 evicted" in lines[2]


def test_verdict_names_what_went_wrong(results: dict[str, Any]) -> None:
    """A mismatch outweighs a death; a clean run has nothing to say."""
    assert verdict(results) == (ExitCode.OK, [])

    results["off"]["guests"]["blue"]["exit_code"] = -9
    assert verdict(results) == (ExitCode.GUEST_DIED, ["off: guest blue died (exit code -9)"])

    results["on"]["guests"]["red"] |= {"mismatches": 2, "mismatch_paths": ["/a", "/b"]}
    code, lines = verdict(results)
    assert code == ExitCode.VIOLATED
    assert lines[1] == "on: red read 2 wrong files: /a, /b"


def test_workload_that_failed_fails_the_run(results: dict[str, Any]) -> None:
    """Verifying less than was asked for is no success."""
    results["on"]["errors"] = ["red: log: No space left on device"]

    assert verdict(results) == (ExitCode.VIOLATED, ["on: red: log: No space left on device"])


def test_latest_points_to_the_newest_results(results: dict[str, Any], tmp_path: Path) -> None:
    """The link is replaced in one step and is relative, so that the folder can be moved."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_results(results, tmp_path / name)

    assert (tmp_path / "latest").readlink() == Path("second")
    assert json.loads((tmp_path / "latest/results.json").read_text()) == results
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "latest", "second"]
