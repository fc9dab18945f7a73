"""The administrator's commands on a real cluster: what is set is obeyed, and outlives a crash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc import attach
from ipc.abi import Op, Reason, Status, pool_flag_word
from tests.support.clusters import tmem, tmem_here, wait_until
from tests.support.hypervisors import RawGuest

pytestmark = pytest.mark.cluster

UUID = "abcdef01-2345-6789-1234-567890abcdef"
SETTINGS = """
weight = 300
cap = "1M"
reserve = "512K"
compress = true
priority = "high"
sharing = "group"
group = "colours"
"""
POOLS = f"""
[[shared_pool]]
uuid = "{UUID}"
writers = ["red"]
readers = ["blue"]
"""


@pytest.fixture(scope="module")
def standing(module_folder: Path, module_cluster_file: Path) -> Iterator[Path]:
    """The folder of a cluster in which red has settings of its own, for all tests that leave
    settings, grants and names as they were."""
    with _up(module_folder, module_cluster_file):
        yield module_folder


@pytest.fixture
def up(folder: Path, cluster_file: Path) -> Iterator[Path]:
    """The same for one test alone."""
    with _up(folder, cluster_file):
        yield folder


@contextlib.contextmanager
def _up(folder: Path, cluster_file: Path) -> Iterator[None]:
    text = cluster_file.read_text()
    text = text.replace('name = "red"\n', f'name = "red"\n{SETTINGS}')
    text = text.replace('scheduling = "greedy"', 'scheduling = "static"')
    cluster_file.write_text(text + POOLS)
    done = tmem("up", "-d", "-f", str(cluster_file), cwd=folder)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        tmem("down", cwd=folder)


def ask(folder: Path, *words: str) -> Any:
    """The JSON that a command prints."""
    return json.loads(say(folder, *words, "--json"))


def say(folder: Path, *words: str) -> str:
    """The text that a command prints."""
    done = tmem_here(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def settings(folder: Path, name: str) -> dict[str, Any]:
    """What is set of a guest."""
    keys = (
        "frozen",
        "weight",
        "cap_bytes",
        "reserve_bytes",
        "compress",
        "priority",
        "sharing",
        "group",
    )
    guest = ask(folder, "list")["guests"][name]
    return {key: guest[key] for key in keys}


def read_tree(folder: Path, guest: str) -> None:
    """Read every file in a guest, so that pages go to tmem and come back, and are right."""
    sources = [path for path in sorted((folder / "tree").rglob("*")) if path.is_file()]
    names = [f"/{path.relative_to(folder / 'tree')}" for path in sources]
    done = tmem_here("exec", guest, "--", "sha256sum", *names, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in sources
    ]


def test_what_the_file_says_holds_from_the_start(standing: Path) -> None:
    """Settings of a guest, grants and the scheduling; others have the defaults."""
    assert settings(standing, "red") == {
        "frozen": False,
        "weight": 300,
        "cap_bytes": 1 << 20,
        "reserve_bytes": 512 << 10,
        "compress": True,
        "priority": "high",
        "sharing": "group",
        "group": "colours",
    }
    assert settings(standing, "blue")["weight"] != 300
    digits = UUID.replace("-", "")
    assert ask(standing, "auth", "list")["grants"] == [
        {"uuid": digits, "guest": "blue", "role": "reader"},
        {"uuid": digits, "guest": "red", "role": "writer"},
    ]
    assert say(standing, "schedule") == "static\n"


def test_settings_outlive_a_killed_hypervisor(up: Path) -> None:
    """Those of the file and those that were made later, and a frozen guest stays frozen."""
    say(up, "set", "red", "--weight", "7", "--cap", "none")
    say(up, "freeze", "blue")
    say(up, "auth", "deny", "blue", UUID)
    say(up, "schedule", "greedy")
    say(up, "balloon", "red", "4M")
    looked_at = ("auth", "list"), ("balloon",)
    before = settings(up, "red"), settings(up, "blue"), [say(up, *words) for words in looked_at]
    (pid,) = (row["pid"] for row in ask(up, "ps") if row["name"] == "hypervisor")

    os.kill(pid, signal.SIGKILL)

    def is_back() -> bool:
        hypervisor = ask(up, "stats")["hypervisor"]
        return hypervisor is not None and hypervisor["generation"] == 2

    wait_until(is_back, "the hypervisor is started again")
    wait_until(lambda: set(ask(up, "list")["guests"]) == {"red", "blue"}, "the guests come back")
    after = settings(up, "red"), settings(up, "blue"), [say(up, *words) for words in looked_at]
    assert after == before
    assert before[1]["frozen"]
    balloons = [line.split() for line in before[2][1].splitlines()]
    assert [row[0] for row in balloons] == ["NAME", "blue", "red"]
    assert balloons[0][2] == "TARGET"
    assert (balloons[1][3], balloons[2][3:5]) == ("-", ["4.0", "MiB"])
    assert say(up, "schedule") == "greedy\n"

    assert len(list(up.glob("runs/*/on/settings"))) == 1
    tmem("down", cwd=up)
    assert list(up.glob("runs/*/on/settings*")) == [], "the next cluster here begins anew"


def test_a_frozen_guest_puts_nothing_new_until_it_is_thawed(standing: Path) -> None:
    """And reads nothing wrong; freezing is what one does before memory is wanted elsewhere."""
    assert tmem_here("flush", "blue", "1G", cwd=standing).returncode == 0
    assert say(standing, "freeze", "blue") == "frozen: blue\n"
    read_tree(standing, "blue")
    read_tree(standing, "blue")

    blue = ask(standing, "list", "blue")["guests"]["blue"]
    assert blue["ephemeral_pages"] == 0
    puts = [blue["operations"].get(name) for name in ("put_page", "put_batch")]
    assert sum(put["refused"].get("frozen", 0) for put in puts if put) > 0
    assert "frozen" in say(standing, "list", "blue")

    assert say(standing, "tmem-thaw", "-a") == ""
    read_tree(standing, "blue")
    read_tree(standing, "blue")
    assert ask(standing, "list", "blue")["guests"]["blue"]["ephemeral_pages"] > 0


def test_flush_and_destroy_lose_no_byte(standing: Path) -> None:
    """Ephemeral pages go, freeable memory becomes free, files are read right afterwards."""
    for guest in ("red", "blue"):
        read_tree(standing, guest)
    before = ask(standing, "freeable")
    assert before["ephemeral_bytes"] > 256 << 10

    done = ask(standing, "flush", "blue", "64K")
    assert done["flushed_pages"] > 0
    assert done["freed_bytes"] >= 64 << 10
    rest = tmem_here("flush", "all", "1G", cwd=standing)
    assert rest.returncode == 0
    assert "all that is left is persistent or reserved" in rest.stderr
    guests = ask(standing, "list")["guests"]
    assert guests["blue"]["ephemeral_pages"] == 0
    # What red has reserved can be taken by its name only.
    assert 0 < guests["red"]["cost_bytes"] <= 512 << 10
    assert tmem_here("flush", "red", "1G", cwd=standing).returncode == 0
    after = ask(standing, "freeable")
    assert after["ephemeral_bytes"] == 0
    assert after["free_bytes"] > before["free_bytes"]
    assert int(say(standing, "tmem-freeable")) == after["freeable_bytes"] >> 20
    read_tree(standing, "red")

    assert re.match(r"destroyed \d+ pools of red\n", say(standing, "destroy", "red", "--yes"))
    assert ask(standing, "list", "red")["guests"]["red"]["ephemeral_pages"] == 0
    read_tree(standing, "red")


def test_a_program_may_join_what_it_was_allowed(up: Path) -> None:
    """By name and uuid, from the next call on, and no longer than that."""
    (socket,) = up.glob("runs/*/on/control.sock")
    token = os.urandom(32)
    attach.enrol(socket.parent, "program", token, os.getuid())
    program = RawGuest(attach.connect(socket.parent, "program", token))
    uuid = int.from_bytes(bytes.fromhex(UUID.replace("-", "")), "little")
    flags = pool_flag_word(shared=True)
    assert program.call(Op.NEW_POOL, flags, uuid).reason == Reason.SHARED_DENIED

    assert say(up, "tmem-shared-auth", "program", "-u", UUID.upper(), "-a", "1") == ""

    made = program.call(Op.NEW_POOL, flags, uuid)
    assert made.status == Status.DONE
    assert program.call(Op.PUT_PAGE, made.value, 1, 0, 1).status == Status.DONE
    row = next(line for line in say(up, "pools").splitlines() if "program" in line).split()
    assert row[1:3] == ["ES", UUID]
    assert row[4:8] == ["program", str(made.value), "writer", "1"]
    assert re.search(r"^S=SI:\d+,PT:ES,U0:[0-9a-f]+,U1:", say(up, "list", "-l"), re.MULTILINE)

    say(up, "auth", "allow", "program", UUID, "--reader")
    assert program.call(Op.PUT_PAGE, made.value, 1, 1, 1).reason == Reason.NOT_WRITER
    assert program.call(Op.GET_PAGE, made.value, 1, 0, 1).status == Status.DONE

    say(up, "tmem-shared-auth", "program", "-u", UUID, "-A", "0")
    assert program.call(Op.GET_PAGE, made.value, 1, 0, 1).reason == Reason.SHARED_DENIED
    program.detach()


def test_tables_and_records_agree_with_json(standing: Path) -> None:
    """Three ways to say one thing, of a cluster that is at rest."""
    read_tree(standing, "blue")
    guests = ask(standing, "list")["guests"]

    rows = say(standing, "list").splitlines()[1:]
    assert [row.split()[0] for row in rows[:2]] == list(guests)
    pools = say(standing, "pools").splitlines()
    assert len(pools) == 2 + sum(len(guest["pools"]) for guest in guests.values())

    records = say(standing, "tmem-list", "-a", "-l").splitlines()
    fields = [
        (letter, dict(field.split(":") for field in rest.split(",")))
        for letter, _, rest in (record.partition("=") for record in records)
    ]
    assert [letter for letter, _ in fields][:2] == ["G", "C"]
    clients = [(int(found["CI"]), int(found["Ec"])) for letter, found in fields if letter == "C"]
    assert clients == [(guest["id"], guest["ephemeral_pages"]) for guest in guests.values()]
    assert sum(int(found["Pc"]) for letter, found in fields if letter == "P") == sum(
        pool["pages"] for guest in guests.values() for pool in guest["pools"]
    )


def test_a_no_is_one_line(standing: Path) -> None:
    """What the hypervisor refuses comes with exit code 64 and changes nothing."""
    before = settings(standing, "blue")

    for words, says in (
        (["set", "blue", "--reserve", "1G"], "reserve"),
        (["set", "blue", "--pool", "63", "--weight", "3"], "pool"),
        (["set", "green", "--weight", "3"], "there is no guest 'green'; there are blue, red"),
        (["destroy", "blue", "--pool", "63", "--yes"], "63"),
        (["auth", "deny", "red", UUID.replace("a", "b")], "no grant"),
    ):
        done = tmem_here(*words, cwd=standing)
        (line,) = done.stderr.splitlines()
        assert says in line
        assert done.returncode == 64

    assert settings(standing, "blue") == before
