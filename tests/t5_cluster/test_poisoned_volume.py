"""One wrong page in the pool of a volume, put by a node with all rights: as real processes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fs.block.file import FileDevice
from fs.ocfs2.fsck.checker import check
from guests.adversaries.raw import file_oid
from hypervisor.provenance import format_oid
from tests.support.clusters import short_folder, tmem_here
from tests.support.ocfs2 import faults
from tools.interrupts import Interrupts
from tools.scenario.stage import Stage, World
from tools.scenario.volume import make_volume

pytestmark = pytest.mark.cluster
FILES = 3


def exec_in(world: World, name: str, *argv: str) -> str:
    """What a command in a guest prints."""
    question = {"verb": "exec", "argv": [*argv]}
    answer: dict[str, Any] = world.cluster.ask_guest(name, question, timeout_seconds=60.0)
    assert answer["exit_code"] == 0, answer
    text = answer["stdout"]
    return text.decode() if isinstance(text, bytes) else str(text)


def sums(world: World, name: str) -> list[str]:
    """The hashes of all files as a guest reads them."""
    paths = [f"/file{number:03}" for number in range(FILES)]
    return [line.split()[0] for line in exec_in(world, name, "sha256sum", *paths).splitlines()]


def counters(world: World, name: str) -> dict[str, int]:
    """What verification has counted, as /proc/vmstat of a guest says."""
    rows = (line.split() for line in exec_in(world, name, "cat", "/proc/vmstat").splitlines())
    return {
        row[0].removeprefix("verification_"): int(row[1])
        for row in rows
        if row[0].startswith("verification_")
    }


def forget(world: World, name: str, other: str) -> None:
    """A guest gives its pages to tmem: another one gets the files' locks in EX."""
    for number in range(FILES):
        exec_in(world, other, "ln", f"/file{number:03}", "/link")
        exec_in(world, other, "rm", "/link")
    exec_in(world, name, "ls", "/")


def _is_in_the_audit_log(world: World, report: dict[str, Any], uuid: bytes) -> None:
    """One event: who caught the page, which it is, and who put it, when and with which token."""
    run = "--run", str(world.directory.path)
    done = tmem_here("audit", *run, "--event", "reported", "--json", cwd=world.directory.path)
    assert done.returncode == 0, done.stderr
    (event,) = map(json.loads, done.stdout.splitlines())
    ((ino, (_, generation)),) = report["paths"].items()
    assert {key: event[key] for key in ("guest", "uuid", "object", "index", "page", "put_by")} == {
        "guest": "alpha",
        "uuid": uuid.hex(),
        "object": format_oid(file_oid(int(ino), generation)),
        "index": "0",
        "page": "there",
        "put_by": "mallory",
    }
    assert event["pid"] == str(world.pid("mallory"))
    assert int(event["token"], 16) > 0
    assert event.get("after", "") < event["time"]
    stats = world.ask("stats")
    assert stats["audit"]["events"]["reported"] == 1
    counted = stats["guests"]["alpha"]["operations"]["report"]
    assert (counted["calls"], counted["done"]) == (1, 1)
    assert "report" not in stats["guests"]["mallory"]["operations"]


@pytest.mark.timeout(240)
def test_one_poisoned_page() -> None:
    """Who checks has it from the disk, counts 1, and it is gone; who does not reads it."""
    with short_folder() as folder, Interrupts() as interrupts:
        stage = Stage(folder, folder / "cache", defence=True, seed=1, interrupts=interrupts)
        volume = make_volume(stage, "alpha", "mallory", files=FILES)
        sources = sorted(Path(stage.cache / f"tree{FILES}").iterdir())
        right = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
        cast = (
            volume.player("alpha", verify=True),
            volume.player("mallory", "filepoison", verify=True),
        )
        with stage.cluster(*cast, grants=volume.grants()) as world:
            assert sums(world, "alpha") == right
            forget(world, "alpha", "mallory")
            report = world.play("mallory", files=1, pages=1)
            assert (report["succeeded"], report["caught"]) == (1, 0)
            assert sums(world, "alpha") == right
            assert sums(world, "mallory") == right
            seen = counters(world, "alpha")
            assert seen["mismatches"] == 1
            assert seen["verified"] > 0
            log = world.directory.log("alpha").read_text()
            assert log.count("event=mismatch") == 1
            _is_in_the_audit_log(world, report, volume.uuid)

            forget(world, "alpha", "mallory")
            exec_in(world, "alpha", "verify", "off")
            assert world.play("mallory", files=1, pages=1)["succeeded"] == 1
            wrong = [one != other for one, other in zip(sums(world, "alpha"), right, strict=True)]
            assert sum(wrong) == 1
            assert counters(world, "alpha")["mismatches"] == 1
        assert stage.tally.problems == []
        device = FileDevice(volume.image, read_only=True)
        assert check(device) == []
        device.close()
        assert faults(volume.image) == []
