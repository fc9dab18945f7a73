"""Nodes of a volume in their jails: they may kill one another, which is what fencing takes, and
nobody else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ipc.jail import missing_parts
from tests.support.clusters import volume_toml, wait_until, write_tree
from tests.support.jailedclusters import wait_for_work
from tools.cluster import Cluster
from tools.config import read_config
from tools.demo import copy_disks, plan_cluster, prepare_disks
from tools.interrupts import Interrupts
from tools.rundir import ClusterDirectory
from tools.volumeimage import build_volume

pytestmark = pytest.mark.cluster


@pytest.mark.skipif(
    os.geteuid() != 0 or bool(missing_parts()), reason="user ids are what decides here"
)
def test_a_node_kills_nodes_of_its_volume_and_nobody_else(
    folder: Path, cluster_name: str, expect_warning: Callable[[str], None]
) -> None:
    """Red is a node and no friend; blue is another one, green has a disk of its own."""
    expect_warning("event=guest-died guest=blue exit_code=-9")
    tree = write_tree(folder / "tree", files=2)
    image = build_volume(str(tree), 2**20, "data", 2, folder / "made").path
    text = volume_toml(cluster_name, tree, image=image, guests=("red", "blue"))
    text += f'[[guest]]\nname = "green"\nmemory = "1M"\ntree = "{tree}"\n'
    (folder / "cluster.toml").write_text(text)
    config = read_config(folder / "cluster.toml")
    directory = ClusterDirectory(folder / "on")
    disks = prepare_disks(config, folder / "cache")
    copy_disks(disks, directory)
    plan = plan_cluster(config, disks, directory, "on")
    probe = "tests.support.jailprobe"
    plan = replace(plan, guests=[replace(guest, adversary=probe) for guest in plan.guests])

    with Interrupts() as interrupts, Cluster(plan, directory, interrupts) as cluster:
        record = directory.read()
        assert record is not None
        pids = {guest.name: guest.pid for guest in record.guests}
        stranger = wait_for_work(cluster, "green", {"sibling_door": "node-red.sock"})
        status = wait_for_work(
            cluster,
            "red",
            {
                "node": 1,
                "sibling": pids["blue"],
                "stranger": pids["green"],
                "hypervisor": cluster.stats()["pid"],
            },
        )
        news: list[str] = []

        def blue_is_gone() -> bool:
            news.extend(cluster.watch())
            return bool(news)

        wait_until(blue_is_gone, "the end of blue")

    assert news == ["guest blue died (exit code -9)"]
    assert stranger["report"]["knock at a node"] == "EACCES"
    report = dict(status["report"])
    assert report.pop("uid") != report.pop("real_uid"), "by which nodes know each other"
    assert report == {
        "read /etc/shadow": "EACCES",
        "ask the administrator's socket": "EPERM",
        "read what everybody may": "EACCES",
        "write into /proc": "EPERM",
        "read the stranger's stat": "done",
        "open the stranger's memory": "EACCES",
        "open the sibling's memory": "EACCES",
        "end the stranger": "EPERM",
        "kill the stranger": "EPERM",
        "kill the hypervisor": "EPERM",
        "kill the supervisor": "EPERM",
        "end the sibling": "EPERM",
        "kill the sibling": "done",
    }
