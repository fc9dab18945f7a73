"""A cluster of real processes with somebody in it who is not to be trusted: what he put is found
and goes, what he may no longer do he can't, and no secret lies where he could find it."""

from __future__ import annotations

import json
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from guests.api import DamagedPage, NotAllowed, Pool, Tmem
from hypervisor.audit import BURST_LINES
from ipc import attach
from ipc.abi import TOKEN_BYTES, Reason
from ipc.errors import Disconnected, OperatorError
from ipc.segment import SHARED_MEMORY_DIRECTORY
from tests.support.clusters import short_folder, tmem_here, volume_toml, wait_until, write_tree
from tests.support.secrecy import Secrets, found_at, readable_by_others
from tools.cluster import Cluster
from tools.config import read_config
from tools.demo import check_cluster, copy_disks, plan_cluster, prepare_disks
from tools.interrupts import Interrupts
from tools.rundir import ClusterDirectory

pytestmark = pytest.mark.cluster

UUID = bytes(range(16))
GOOD, LATER, OWN = (
    word + bytes(range(256)) * 15 + bytes(252) for word in (b"good", b"newr", b"mine")
)
BAD = b"bad " * 1024
FILE = 77
TOKEN = 3 << 32 | 9
TREE_FILES = 12


class Live:
    """The cluster, supervised by this process, and commands about it."""

    def __init__(self, cluster: Cluster, secrets: Secrets) -> None:
        self.cluster = cluster
        self.secrets = secrets
        self.path = cluster.directory.path

    def say(self, *words: str) -> str:
        """What a command prints."""
        at = 1 if words[0] == "exec" else len(words)
        run = "--run", str(self.path)
        done = tmem_here(*words[:at], *run, *words[at:], cwd=self.path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, *words: str) -> Any:
        return json.loads(self.say(*words, "--json"))

    def audit(self, *words: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.say("audit", *words, "--json").splitlines()]

    def page(self, index: int) -> list[dict[str, Any]]:
        """Who put it, as `tmem pools --page` says."""
        oid = FILE.to_bytes(8, "little").hex()
        found = self.ask("pools", "--page", f"{oid}:{index}")["pages"]
        return [page for page in found if page["uuid"] == UUID.hex()]

    def program(self, name: str) -> Tmem:
        """A program of this test's that may attach."""
        token = self.secrets.random_bytes(TOKEN_BYTES)
        attach.enrol(self.path, name, token, os.getuid())
        return Tmem.connect(self.path, name, token)

    def pids(self) -> dict[str, int]:
        return {row["name"]: row["pid"] for row in self.ask("ps")}

    def kill_hypervisor(self) -> None:
        """SIGKILL; everybody is back when this returns."""
        generation = self.cluster.stats()["generation"]
        os.kill(self.pids()["hypervisor"], signal.SIGKILL)

        def is_back() -> bool:
            self.cluster.watch()
            try:
                stats = self.cluster.stats()
            except Disconnected:
                return False
            return bool(
                stats["generation"] > generation
                and all(stats["guests"].get(name, {}).get("attached") for name in ("red", "blue"))
            )

        wait_until(is_back, "everybody is back")


@pytest.fixture
def live(cluster_name: str) -> Iterator[Live]:
    """Two nodes of a volume; its hypervisor checks what it gives."""
    secrets = Secrets()
    with short_folder() as folder, patch("os.urandom", secrets.random_bytes):
        tree = write_tree(folder / "tree", files=TREE_FILES)
        text = volume_toml(cluster_name, tree, guests=("red", "blue"))
        text = text.replace("[hypervisor]\n", "[hypervisor]\nchecksums = true\n")
        (folder / "cluster.toml").write_text(text)
        config = read_config(folder / "cluster.toml")
        directory = ClusterDirectory(folder / "on")
        check_cluster(config, directory)
        disks = prepare_disks(config, folder / "cache")
        plan = plan_cluster(config, disks, directory, "on")
        directory.make()
        copy_disks(disks, directory)
        with Cluster(plan, directory, Interrupts()) as cluster:
            yield Live(cluster, secrets)


def test_bad_pages_are_found_and_go_and_their_putter_is_out(
    live: Live, expect_warning: Callable[[str], None]
) -> None:
    """A writer of a shared pool puts wrong bytes under others' handles.  Who it was is told, also
    after the hypervisor was killed; quarantine takes all of it and nothing else, and a guest whose
    grants are gone is refused at its next call."""
    expect_warning("event=hypervisor-died exit_code=-9")
    with live.program("victim") as victim, live.program("mallory") as mallory:
        for name in ("victim", "mallory"):
            live.say("auth", "allow", name, UUID.hex())
        pool, his = victim.pool(shared_uuid=UUID), mallory.pool(shared_uuid=UUID)
        own = mallory.pool(persist=True)
        assert own.put(1, 0, OWN)
        for index in range(64):
            assert pool.put(FILE, index, GOOD, token=TOKEN)
        for index in range(0, 64, 2):
            assert his.put(FILE, index, BAD, token=TOKEN)
        assert pool.get_extent(FILE, 0, 2) == [BAD, GOOD]
        assert not pool.report(FILE, 0, GOOD)
        assert pool.report(FILE, 0, BAD)
        replaced, event = live.audit("--event", "reported")
        assert replaced["page"] == "replaced"
        assert "put_by" not in replaced
        assert (event["guest"], event["put_by"]) == ("victim", "mallory")
        assert int(event["token"], 16) == TOKEN

        (page,) = live.page(0)
        assert (page["guest"], page["token"], page["pid"]) == ("mallory", TOKEN, os.getpid())
        assert page["right"] is True
        assert page["before_ns"] - page["after_ns"] > 0 or not page["before_ns"]
        shown = live.say("pools", "--page", f"{FILE}.0:1")
        assert [line.split()[3] for line in shown.splitlines()[1:]] == ["victim"]
        assert " 3.9 " in shown

        with live.program("mayfly") as mayfly:
            live.say("auth", "allow", "mayfly", UUID.hex())
            assert mayfly.pool(shared_uuid=UUID).put(FILE, 64, BAD, token=TOKEN)

        live.kill_hypervisor()
        assert victim.reconnect()
        assert mallory.reconnect()
        assert [live.page(index)[0]["guest"] for index in (0, 1)] == ["mallory", "victim"]
        assert live.page(0)[0]["token"] == TOKEN
        (left,) = live.page(64)
        assert (left["guest"], left["left"]) == ("mayfly", True), "who has gone is still told"
        assert pool.get(FILE, 0) == BAD

        done = live.ask("quarantine", "mallory", "--also-deny")
        assert (done["pages"], done["pools"], done["denied"]) == (32, 1, [UUID.hex()])
        got = pool.get_extent(FILE, 0, 64)
        assert got == [None if index % 2 == 0 else GOOD for index in range(64)]
        assert own.get(1, 0) == OWN, "what is private is its own"
        assert live.cluster.stats()["quarantined_pages"] == {"mallory": 32}
        for call in (
            lambda: his.put(FILE, 0, BAD, token=TOKEN),
            lambda: his.get(FILE, 1),
            lambda: his.flush_page(FILE, 1),
            lambda: his.flush_object(FILE),
        ):
            with pytest.raises(NotAllowed) as refusal:
                call()
            assert refusal.value.reason is Reason.SHARED_DENIED
        assert pool.put(FILE, 0, LATER, token=TOKEN)
        assert pool.get(FILE, 0) == LATER

        told = live.audit("--guest", "mallory", "--event", "denied")
        assert [event["detail"].split()[0] for event in told] == ["call", "call", "call", "flush"]
        (line,) = live.audit("--guest", "mallory", "--event", "quarantine")
        assert (line["guest"], line["pages"], line["result"]) == ("administrator", "32", "done")

        _rot(live, own)
    _flood(live)


def _rot(live: Live, own: Pool) -> None:
    """A bit of a persistent page flips where it lies: that is an error, and no page."""
    segment = SHARED_MEMORY_DIRECTORY / (live.path / "arena").read_text().strip().lstrip("/")
    with segment.open("r+b") as file, mmap.mmap(file.fileno(), 0) as arena:
        at = arena.find(OWN)
        assert at > 0
        arena[at + 77] ^= 16
    for _ in range(2):
        with pytest.raises(DamagedPage):
            own.get(1, 0)
    assert live.cluster.stats()["damaged_pages"] == 2
    told = live.audit("--event", "checksum")
    assert [(event["guest"], event["reason"]) for event in told] == [("mallory", "damaged")] * 2
    assert told[0]["detail"].endswith("01:0 put by mallory")


def _flood(live: Live) -> None:
    """A thousand refusals are a few lines, and all of them are counted.  So are a thousand claims
    that pages are wrong."""
    log = live.path / "log" / "audit.log"
    with live.program("flood") as flood:
        live.say("auth", "allow", "flood", UUID.hex(), "--reader")
        pool = flood.pool(shared_uuid=UUID)
        before = log.stat().st_size
        for index in range(1000):
            with pytest.raises(NotAllowed):
                pool.put(FILE, index, BAD)
        lines = live.audit("--guest", "flood", "--event", "denied")
        counted = live.cluster.stats()["audit"]["events"]["denied"]
        assert counted >= 1000
        assert BURST_LINES <= len(lines) < 4 * BURST_LINES
        assert log.stat().st_size - before < 150 * len(lines)

        assert not any(pool.report(FILE, index, BAD) for index in range(1000))
        stats = live.cluster.stats()
        assert stats["audit"]["events"]["reported"] == 1000
        assert stats["guests"]["flood"]["operations"]["report"]["missed"] == 1000
        assert len(live.audit("--guest", "flood")) < 8 * BURST_LINES
        assert log.stat().st_size - before < 150 * 8 * BURST_LINES


def test_secrets_lie_nowhere_and_can_be_drawn_anew(
    live: Live, expect_warning: Callable[[str], None]
) -> None:
    """Tokens, keys and what they become: on no command line, in no environment, in no log, in
    files of mode 0600.  The old token attaches nobody, and everybody has the new ones when they
    are needed: the hypervisor is killed, and a node started again."""
    expect_warning("event=hypervisor-died exit_code=-9")
    expect_warning("event=guest-died guest=blue exit_code=-9")
    old = live.secrets.of(TOKEN_BYTES)
    assert len(old) >= 3, "two tokens and a key"
    live.say("rotate", "token")
    live.say("rotate", "key", "data")
    live.say("rotate", "seed")
    new = live.secrets.of(TOKEN_BYTES)[len(old) :]
    assert len(new) == 3
    for token in old:
        with pytest.raises(OperatorError, match="not enrolled with this token"):
            attach.connect(live.path, "red", token)
    # That is as another user, who would be refused with any token; as its own:
    uid = attach.enrolled_uid(live.path, "red")
    assert uid is not None
    good = [
        one for one in (*old, *new) if attach.is_enrolled(live.path, attach.Hello("red", one), uid)
    ]
    assert len(good) == 1
    assert good[0] in new

    live.kill_hypervisor()
    os.kill(live.pids()["blue"], signal.SIGKILL)

    def is_dead() -> bool:
        live.cluster.watch()
        return "blue" not in live.cluster.alive

    wait_until(is_dead, "the end of blue")
    live.cluster.revive("blue")
    assert live.say("exec", "blue", "--", "ls", "/")

    keys = live.path / "keys"
    assert found_at(live.secrets.of(TOKEN_BYTES), live.path, live.pids().values()) == {
        str(keys / "data")
    }
    assert [(path.name, oct(path.stat().st_mode & 0o777)) for path in keys.iterdir()] == [
        ("data", "0o600")
    ]
    images = live.cluster.directory.images
    assert {
        path
        for path in readable_by_others(live.path)
        if not Path(live.path, path).is_relative_to(images)
    } == set()
    told = live.audit("--event", "reseed", "--event", "rotated")
    assert {event["guest"] for event in told} == {"administrator"}
    changed = [(event["event"], event.get("about"), event["detail"]) for event in told]
    assert sorted(changed, key=str) == [
        ("reseed", None, "{}"),
        ("rotated", "blue", "{'what': 'token'}"),
        ("rotated", "red", "{'what': 'token'}"),
        ("rotated", None, "{'what': 'key', 'volume': 'data'}"),
    ]

    _refused_rotations(live)


def _refused_rotations(live: Live) -> None:
    """What can't be rotated is told, and nothing changes."""
    for words, says in (
        (("token", "nobody"), "no guest 'nobody'"),
        (("key", "nothing"), "no volume 'nothing'"),
    ):
        done = tmem_here("rotate", *words, "--run", str(live.path), cwd=live.path)
        assert done.returncode == 64
        assert says in done.stderr.replace("that answers has a volume", "no volume")
    assert live.say("exec", "red", "--", "ls", "/")
