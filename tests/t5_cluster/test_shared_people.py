"""What people see of a shared volume: tmem ps, tmem locks, tmem fs stat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guests.nodeview import split_lock_name
from tests.support.clusters import (
    left_behind,
    tmem,
    tmem_here,
    volume_toml,
    wait_until,
    write_tree,
)

pytestmark = pytest.mark.cluster


def test_people_see_nodes_locks_and_slots_by_name(folder: Path, cluster_name: str) -> None:
    """In a cluster of two, after one of them made a folder."""
    tree = write_tree(folder / "tree", files=12)
    cluster = volume_toml(cluster_name, tree, guests=("red", "blue"), orphan_scan=0.2)
    (folder / "cluster.toml").write_text(cluster)
    done = tmem("up", "-d", "-f", "cluster.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    try:
        assert tmem_here("exec", "red", "--", "mkdir", "/made", cwd=folder).returncode == 0
        listed = tmem_here("exec", "blue", "--", "stat", "/made", "/made", cwd=folder)
        assert listed.returncode == 0

        rows = {
            row["name"]: row for row in json.loads(tmem_here("ps", "--json", cwd=folder).stdout)
        }
        nodes = [rows[name]["node"] for name in ("red", "blue")]
        assert [node["number"] for node in nodes] == [0, 1]
        assert sorted(node["slot"] for node in nodes) == [0, 1]
        assert all(node["members"] == ["red", "blue"] for node in nodes)
        assert len({node["epoch"] for node in nodes}) == 1
        assert all(node["heartbeat_age_seconds"] < 3 for node in nodes)
        assert all(node["fenced"] is None for node in nodes)
        assert {"NODE", "SLOT", "MASTERS"} <= set(tmem_here("ps", cwd=folder).stdout.split())

        def list_locks() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = json.loads(
                tmem_here("locks", "--json", cwd=folder).stdout
            )
            return found

        # The first scan comes between two steps of a node, at its own time.
        wait_until(
            lambda: "orphan scan" in {lock["kind"] for lock in list_locks()}, "an orphan scan"
        )
        locks = list_locks()
        mastered = [sum(lock["master"] == name for lock in locks) for name in ("red", "blue")]
        assert all(mastered)
        assert {"meta", "super", "dentry", "orphan scan"} <= {lock["kind"] for lock in locks}
        made = int(listed.stdout.split("Inode: ")[1].split()[0])
        kept = [lock for lock in locks if lock["kind"] == "dentry" and lock["inode"] == made]
        assert [lock["holders"] for lock in kept] == [{"blue": "PR"}]
        root = [lock for lock in locks if lock["kind"] == "meta" and lock["inode"] == 5]
        assert set(root[0]["holders"]) <= {"red", "blue"}
        assert root[0]["token"] > 0
        table = tmem_here("locks", "--inode", "5", cwd=folder).stdout.splitlines()
        assert len(table) == 1 + sum(lock["inode"] == 5 for lock in locks)

        volumes = json.loads(tmem_here("fs", "stat", "--json", cwd=folder).stdout)
        assert {volume["type"] for volume in volumes.values()} == {"ocfs2"}
        slots = volumes["red"]["slots"]
        assert sorted(slot["node"] for slot in slots) == ["blue", "red"]
        assert [(slot["slot"], slot["journal"]) for slot in slots] == [(0, "dirty"), (1, "dirty")]
        assert all(slot["sequence"] > 0 for slot in slots)
        assert volumes["red"]["features"] == ["strict-journal-super", "extended-slotmap"]
        assert volumes["red"]["uuid"] == volumes["blue"]["uuid"]
        one = tmem_here("fs", "stat", "--guest", "red", cwd=folder).stdout
        assert "strict-journal-super,extended-slotmap" in one
        uuid = volumes["red"]["uuid"]
        lines = [line.split() for line in one.splitlines() if line.startswith(uuid)]
        assert [line[:4] for line in lines] == [
            [uuid, str(slot["slot"]), slot["node"], "dirty"] for slot in slots
        ]
        wrong = tmem_here("fs", "stat", "--guest", "nobody", cwd=folder)
        assert wrong.returncode == 64
        assert "there are red, blue" in wrong.stderr
    finally:
        tmem("down", cwd=folder)
    assert left_behind(folder, cluster_name) == []


def test_names_of_locks_are_taken_apart() -> None:
    """By OCFS2's letters; another form is no error."""
    assert split_lock_name(b"M0000000000000000000018feb14715") == ("meta", 0x18)
    assert split_lock_name(b"S000000000000000000000200000000") == ("super", 2)
    assert split_lock_name(b"N0000000000000b5400000000000b57") == ("dentry", 0xB57)
    assert split_lock_name(b"?") == ("other", None)
