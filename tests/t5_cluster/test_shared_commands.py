"""The sharing test and the coherence test as commands, with real guests on one volume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.clusters import left_behind, tmem, tmem_here, volume_toml, write_tree

pytestmark = pytest.mark.cluster


def shared_file(folder: Path, name: str, *guests: str, files: int = 60) -> str:
    """A cluster file of guests that share a small volume."""
    tree = write_tree(folder / "tree", files=files)
    path = folder / "cluster.toml"
    path.write_text(volume_toml(name, tree, guests=guests))
    return str(path)


def test_sharing_saves_disk_reads(folder: Path, cluster_name: str) -> None:
    """Three guests read one tree: what one has read the others get, and it is what the disk has."""
    file = shared_file(folder, cluster_name, "red", "blue", "green")

    done = tmem("up", "-f", file, "--test", "sharing", "--json", "-q", cwd=folder)

    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert {"disk_reads_pages", "verified_pages", "mismatches", "seed"} <= set(results)
    reads = results["disk_reads_pages"]
    assert 0 < reads["shared"] < reads["private"]
    tree_bytes = sum(path.stat().st_size for path in (folder / "tree").rglob("*.*"))
    # One alone reads it once and then twice, the others too, in two runs.
    assert results["verified_pages"] >= 2 * 3 * 3 * tree_bytes // 4096
    assert results["mismatches"] == 0
    for pool in ("private", "shared"):
        guests = results[pool]["guests"]
        assert set(guests) == {"red", "blue", "green"}
        assert sum(guest["disk_reads_pages"] for guest in guests.values()) == reads[pool]
        assert results[pool]["total_memory_bytes"] == 7 * 2**20
    assert left_behind(folder, cluster_name) == []


def test_coherence_holds_under_kills_and_pauses(folder: Path, cluster_name: str) -> None:
    """Nodes are killed and stopped while they share files, come back, and no read is old."""
    file = shared_file(folder, cluster_name, "red", "blue", "green", files=12)
    words = ["--test", "coherence", "--nemesis", "kill,pause", "--seconds", "5", "--json"]

    done = tmem("up", "-f", file, *words, cwd=folder)

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    results = json.loads(done.stdout)
    assert results["verdict"] == "holds"
    assert results["lost_nodes"]
    assert results["reads_of_others_writes"] > 0
    assert results["violations"] == results["damage"] == results["problems"] == []
    assert left_behind(folder, cluster_name) == []


def test_coherence_holds_when_the_hypervisor_is_killed(folder: Path, cluster_name: str) -> None:
    """It comes back on its arena, drops pages, is killed again; still no read is old."""
    file = shared_file(folder, cluster_name, "red", "blue", files=12)
    words = ["--test", "coherence", "--nemesis", "hypervisor,drop", "--seconds", "2", "--json"]

    done = tmem("up", "-f", file, *words, cwd=folder)

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    results = json.loads(done.stdout)
    assert any("hypervisor" in action for action in results["nemesis"])
    assert results["reads_of_others_writes"] > 0
    assert results["lost_nodes"] == []
    assert "hypervisor restarted" in done.stderr


def test_tests_of_shared_disks_need_one(folder: Path, cluster_name: str) -> None:
    """One line each; nothing is started."""
    tree = write_tree(folder / "tree", files=3)
    (folder / "alone.toml").write_text(volume_toml(cluster_name, tree, guests=("red",)))
    for words, says in (
        (["-f", "alone.toml", "--test", "sharing"], "two or more guests mount"),
        (["--topo", "pair", "--test", "coherence"], "take --topo shared"),
        (["--test", "gossip"], "there are sharing, coherence"),
        (["--nemesis", "kill"], "belongs to --test coherence"),
        (["--test", "coherence", "--nemesis", "hail"], "there is no nemesis 'hail'"),
        (["--test", "coherence", "-d"], "leave out -d"),
    ):
        done = tmem_here("up", *words, cwd=folder)

        (line,) = done.stderr.splitlines()
        assert says in line
        assert done.returncode == 64
    assert left_behind(folder, cluster_name) == []
