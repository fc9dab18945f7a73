"""The measured run as one command: its figures, where they come from, and that they agree."""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import left_behind, read_results, tmem
from tests.support.tools import need_tool

pytestmark = pytest.mark.cluster

GUEST_KEYS = {
    "disk_reads_pages",
    "disk_writes_pages",
    "files_verified",
    "bytes_verified",
    "mismatches",
    "seconds",
}
HYPERVISOR_KEYS = {"cpu_seconds", "hypercalls", "pages_put", "pages_got", "evictions"}
CLEANCACHE_KEYS = {"succ_gets", "failed_gets", "puts", "invalidates"}


@pytest.fixture(scope="module")
def results(module_folder: Path, module_cluster_file: Path) -> dict[str, Any]:
    """A measured run of two small guests, disks kept; its folder is `module_folder`."""
    done = tmem("up", "-f", str(module_cluster_file), "--keep-images", cwd=module_folder)
    assert done.returncode == 0, done.stderr
    return read_results(module_folder)


def test_measured_run_documents_its_figures(
    results: dict[str, Any], module_folder: Path, module_cluster_file: Path
) -> None:
    """Every documented key is there, work was done and verified, saved reads are real."""
    tree_bytes = sum(path.stat().st_size for path in (module_folder / "tree").rglob("*.*"))

    assert results["seed"] == 7
    assert results["off"]["total_memory_bytes"] == results["on"]["total_memory_bytes"]
    assert results["on"]["total_memory_bytes"] == 4 * 2**20
    for mode in ("off", "on"):
        assert set(results[mode]["hypervisor"]) >= HYPERVISOR_KEYS
        assert set(results[mode]["guests"]) == {"red", "blue"}
        for guest in results[mode]["guests"].values():
            assert set(guest) >= GUEST_KEYS
            assert guest["mismatches"] == 0
            assert guest["bytes_verified"] >= 3 * tree_bytes
            assert guest["disk_reads_pages"] * 4096 >= tree_bytes
            assert guest["disk_writes_pages"] > 0
            assert guest["seconds"] > 0
    # Of all together: which of two guests at work at once gets the memory is a matter of time.
    reads = [
        sum(guest["disk_reads_pages"] for guest in results[mode]["guests"].values())
        for mode in ("off", "on")
    ]
    assert reads[0] > reads[1]
    name = tomllib.loads(module_cluster_file.read_text())["name"]
    assert left_behind(module_folder, name) == []


def test_guests_and_hypervisor_count_the_same_pages(results: dict[str, Any]) -> None:
    """Two processes counted each put and get independently."""
    puts = hits = 0
    for guest in results["on"]["guests"].values():
        ours, theirs = guest["cleancache"], guest["hypervisor"]["cleancache"]

        assert set(ours) >= CLEANCACHE_KEYS
        assert ours["succ_gets"] == theirs["succ_gets"]
        assert ours["failed_gets"] == theirs["failed_gets"]
        assert ours["puts"] == theirs["puts"]
        assert ours["succ_gets"] > 0
        puts += ours["puts"]
        hits += ours["succ_gets"]

    assert puts == results["on"]["hypervisor"]["pages_put"]
    assert hits == results["on"]["hypervisor"]["pages_got"]
    for guest in results["off"]["guests"].values():
        assert "cleancache" not in guest
    assert results["off"]["hypervisor"]["hypercalls"] == 0


def test_disks_are_clean_after_the_run(results: dict[str, Any], module_folder: Path) -> None:
    """A checker that is not ours finds nothing to repair on any guest's disk."""
    e2fsck = need_tool("e2fsck")

    images = sorted((module_folder / "runs/latest").glob("o*/images/*.img"))

    assert len(images) == 4
    for image in images:
        done = subprocess.run([e2fsck, "-fn", image], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_file_that_differs_from_its_source_fails_the_run(
    results: dict[str, Any], module_folder: Path, module_cluster_file: Path, folder: Path
) -> None:
    """A wrong byte on a disk is found by name in both runs, and the command exits with 1."""
    shutil.copytree(module_folder / "runs/cache", folder / "runs/cache")
    (manifest_path,) = (folder / "runs/cache").glob("*.json")
    manifest = json.loads(manifest_path.read_text())
    wrong = min(manifest)
    manifest[wrong] = "0" * 64
    manifest_path.write_text(json.dumps(manifest))

    done = tmem("up", "-f", str(module_cluster_file), cwd=folder)

    assert done.returncode == 1
    assert f"off: red read 3 wrong files: /{wrong}" in done.stderr
    assert f"on: blue read 3 wrong files: /{wrong}" in done.stderr
    assert read_results(folder)["on"]["guests"]["red"]["mismatches"] == 3


def test_same_seed_gives_the_same_work(
    results: dict[str, Any], module_folder: Path, module_cluster_file: Path, folder: Path
) -> None:
    """Without tmem nothing depends on time: the disk reads of two runs are the same."""
    shutil.copytree(module_folder / "runs/cache", folder / "runs/cache")
    records = [results]
    for seed in (results["seed"], 6):
        words = ["--seed", str(seed), "--json", "-q"]
        done = tmem("up", "-f", str(module_cluster_file), *words, cwd=folder)
        assert done.returncode == 0, done.stderr
        records.append(json.loads(done.stdout))
        assert records[-1]["seed"] == seed
    seen = [
        [guest["disk_reads_pages"] for guest in record["off"]["guests"].values()]
        for record in records
    ]

    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
