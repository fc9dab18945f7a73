"""The benchmark as a whole, with sizes so small that its figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.clusters import ROOT, short_folder

SMALL = {
    "--phase-seconds": "0.01",
    "--repetitions": "2",
    "--patience-seconds": "0",
    "--working-set-pages": "2048",
    "--full-mib": "4",
    "--metadata-mib": "8",
    "--bounded-pages": "4096",
    "--guest-counts": "1,2",
}
OURS = (
    "extent_hypervisor_us_per_page",
    "extent_pages_per_second",
    "metadata_fraction",
    "metadata_fraction_small_files",
    "metadata_fraction_shared",
)
BY_PEER = {
    "C ping-pong 64 bytes (mq)": ("get_vs_c_mq", "put_vs_c_mq", "ring_get_vs_c_mq"),
    "C memcpy cold 4 KiB": ("extent_vs_memcpy",),
    "redis": ("get_vs_redis", "extent_vs_redis", "extent64_vs_redis"),
    "memcached": ("extent_vs_memcached", "extent64_vs_memcached"),
    "lmdb": ("extent_vs_lmdb", "extent64_vs_lmdb"),
}


class Run(NamedTuple):
    """A run that has ended."""

    code: int
    output: str
    messages: str
    pid: int
    written: dict[str, Any]


def run(folder: Path, path: str) -> Run:
    """Run the benchmark with its temporary files and its result in `folder`."""
    result = folder / "latest.json"
    sizes = [word for option in SMALL.items() for word in option]
    with subprocess.Popen(
        [sys.executable, "-m", "tools.bench", "--quick", "--json", "--output", result, *sizes],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        output, messages = process.communicate()
    written = json.loads(result.read_text()) if result.exists() else {}
    result.unlink(missing_ok=True)
    return Run(process.returncode, output, messages, process.pid, written)


def processes_that_name(text: str) -> list[str]:
    """Command lines of living processes that mention `text`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in command:
            found.append(command)
    return found


@pytest.mark.cluster
@pytest.mark.slow
def test_a_run_gives_every_documented_figure_and_leaves_nothing() -> None:
    """All rows and ratios of the peers that are here, pinned and not; no file, no process after."""
    with short_folder() as folder:
        done = run(folder, os.environ["PATH"])
        assert done.code == 0, done.messages
        assert list(folder.iterdir()) == []
        assert processes_that_name(str(folder)) == []
    segments = os.listdir("/dev/shm")
    assert [name for name in segments if name.startswith(f"tmem-bench{done.pid}-")] == []
    assert json.loads(done.output) == done.written
    skipped = {one["name"] for one in done.written["skipped"]}
    ratios = done.written["ratios"]
    for peer, keys in BY_PEER.items():
        for key in keys:
            assert (ratios[key] is None) == (peer in skipped), key
    for key in OURS:
        assert ratios[key] > 0, key
    rows = done.written["rows"]
    names = {pinned: {row["name"] for row in rows if row["pinned"] is pinned} for pinned in (0, 1)}
    assert names[0] == names[1]
    for row in rows:
        assert row["unit"] == "us/call"
        assert row["median"] > 0, row["name"]
        assert row["p99"] > 0, row["name"]
        assert row["spread"] >= 0, row["name"]
    settings = {row["setting"] for row in done.written["transport_rows"]}
    assert {"one core", "hog on each core"} <= settings
    assert ratios["ring_get_beside_hogs_vs_mqueue"] > 0
    assert 0 <= ratios["idle_cpu_share"] < 1
    for row in done.written["bounded_rows"]:
        assert row["meanwhile"]["worst"] >= row["meanwhile"]["median"] > 0, row["name"]
    rates = {row["name"]: row["hit_rate"] for row in rows if "hit_rate" in row}
    assert rates
    assert all("arena 2/3" in name and 0 < rate < 1 for name, rate in rates.items()), rates


@pytest.mark.cluster
@pytest.mark.slow
def test_missing_peers_are_skipped_by_name() -> None:
    """Without a compiler the C rows are named as skipped and only their ratios are null."""
    with short_folder() as folder:
        empty = folder / "empty"
        empty.mkdir()
        done = run(folder, str(empty))
        assert done.code == 0, done.messages
        assert list(folder.iterdir()) == [empty]
    reasons = {one["name"]: one["reason"] for one in done.written["skipped"]}
    assert "no C compiler" in reasons["C ping-pong 64 bytes (mq)"]
    assert done.written["ratios"]["get_vs_c_mq"] is None
    assert done.written["ratios"]["extent_pages_per_second"] > 0
