"""The administrator's commands: what they ask, what they print, how they say no.

A stand-in answers on the control socket, because most of this is about answers that a real
hypervisor rarely gives; `test_administration` in t5_cluster has the real one.
"""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from ipc.codec import Record
from ipc.names import process_start
from tests.support.clusters import command, environment
from tests.support.standin import (
    DIGITS,
    FREEABLE,
    GRANTED,
    GUESTS,
    LISTED,
    POOLED,
    UUID,
    Standin,
)
from tools.administer import POOLS_HEADER
from tools.cli import main
from tools.rundir import ENVIRONMENT, ClusterDirectory, ClusterRecord


def tmem(*words: str) -> int:
    """The command's exit code, in this process."""
    return main(list(words))


def test_list_is_a_table_and_the_arena(
    hypervisor: Standin, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings in the words that `set` takes, figures in pages and binary units."""
    assert tmem("list") == 0

    header, alpha, bravo, _legend, arena, saved = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["NAME", "ID", "STATE", "WEIGHT"]
    assert (
        " ".join(alpha.split())
        == "alpha 1 frozen 300 8.0 MiB - on normal group:web 2.0 MiB 1,234 5 3.0 MiB 4.0 MiB"
    )
    assert bravo.split()[:7] == ["bravo", "2", "detached", "100", "-", "1.0", "MiB"]
    assert arena.startswith("arena 16.0 MiB: 2,000 of 4,000 frames free, 512 lent as RAM, 1,234 ")
    assert arena.endswith("scheduling greedy, eviction clock")
    assert saved == "saved: filled 10 pages (40.0 KiB)"


def test_one_guest_is_listed_by_name_or_number(hypervisor: Standin) -> None:
    """As Xen's hands write a domain."""
    assert tmem("list", "bravo") == 0
    assert tmem("list", "2") == 0

    assert [one for one in hypervisor.asked("list") if one] == [{"guest": "bravo"}] * 2


def test_pools_have_a_line_for_each_member(
    hypervisor: Standin, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line stands alone, so it can be searched for."""
    assert tmem("pools") == 0

    header, alpha, bravo, _legend = capsys.readouterr().out.splitlines()
    assert header.split() == list(POOLS_HEADER)
    assert alpha.split()[:8] == ["4", "ES", UUID, "normal", "alpha", "2", "writer", "17"]
    assert bravo.split()[4:7] == ["bravo", "0", "reader"]
    del hypervisor


def test_json_is_the_answer(hypervisor: Standin, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is left out and nothing made up."""
    import json

    for words, answer in (
        (["list"], LISTED),
        (["pools"], POOLED),
        (["freeable"], FREEABLE),
        (["auth", "list"], GRANTED),
        (["set", "alpha", "--weight", "3"], {"guest": GUESTS["alpha"]}),
        (["balloon"], {"balloon_bytes": {"bravo": 8 << 20}, "guests": {}}),
    ):
        assert tmem(*words, "--json") == 0
        assert json.loads(capsys.readouterr().out) == answer
    del hypervisor


# --- what is asked ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "verb", "questions"),
    [
        (["freeze", "alpha"], "freeze", [{"guest": "alpha"}]),
        (["freeze", "--all"], "freeze", [{}]),
        (["thaw", "1"], "thaw", [{"guest": "alpha"}]),
        (["thaw", "-a"], "thaw", [{}]),
        (["schedule", "static"], "schedule", [{"mode": "static"}]),
        (
            ["set", "alpha", "--weight", "5", "--cap", "4M", "--reserve", "64K"],
            "set",
            [{"guest": "alpha", "weight": 5, "cap_bytes": 4 << 20, "reserve_bytes": 65536}],
        ),
        (
            ["set", "alpha", "--cap", "none", "--reserve", "none", "--compress", "off"],
            "set",
            [{"guest": "alpha", "cap_bytes": 0, "reserve_bytes": 0, "compress": False}],
        ),
        (
            ["set", "alpha", "--pool", "0", "--priority", "low"],
            "set",
            [{"guest": "alpha", "pool": 0, "priority": "low"}],
        ),
        (
            ["set", "alpha", "--sharing", "group", "--group", "web", "--compress", "on"],
            "set",
            [{"guest": "alpha", "sharing": "group", "group": "web", "compress": True}],
        ),
        # Not attached yet, but enrolled.
        (["set", "carol", "--weight", "5"], "set", [{"guest": "carol", "weight": 5}]),
        (
            ["auth", "allow", "alpha", UUID],
            "auth",
            [{"action": "allow", "guest": "alpha", "uuid": DIGITS, "role": "writer"}],
        ),
        (
            ["auth", "allow", "alpha", DIGITS.upper(), "--reader"],
            "auth",
            [{"action": "allow", "guest": "alpha", "uuid": DIGITS, "role": "reader"}],
        ),
        (
            ["auth", "deny", "alpha", UUID],
            "auth",
            [{"action": "deny", "guest": "alpha", "uuid": DIGITS}],
        ),
        (["auth", "list", "alpha"], "auth", [{"action": "list", "guest": "alpha"}]),
        (["balloon"], "balloon", [{}]),
        (["balloon", "alpha"], "balloon", [{}]),
        (["balloon", "2", "8M"], "balloon", [{"guest": "bravo", "size_bytes": 8 << 20}]),
        (["balloon", "carol", "none"], "balloon", [{"guest": "carol", "size_bytes": 0}]),
        (["destroy", "alpha", "--yes"], "destroy", [{"guest": "alpha"}]),
        (["destroy", "alpha", "--pool", "0", "-y"], "destroy", [{"guest": "alpha", "pool": 0}]),
    ],
)
def test_commands_ask_for_what_was_said(
    hypervisor: Standin, words: list[str], verb: str, questions: list[Record]
) -> None:
    """Names, sizes and uuids are understood here; 1 allows, in either of Xen's spellings."""
    assert tmem(*words) == 0

    assert hypervisor.asked(verb) == questions


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["freeze", "bravo"], "frozen: alpha, bravo\n"),
        (["thaw", "--all"], "frozen: nobody\n"),
        (["schedule"], "greedy\n"),
        (["freeable"], "5.0 MiB freeable: 3.0 MiB free, 2.0 MiB ephemeral\n"),
        (["destroy", "alpha", "--yes"], "destroyed 3 pools of alpha\n"),
        (["balloon", "alpha", "6400K"], "alpha: balloon target 6.2 MiB; it does not answer\n"),
        (["balloon", "bravo", "none"], "bravo: no balloon target\n"),
        (
            ["balloon"],
            (
                "NAME   RAM   TARGET  LEAST  MOST\n"
                "alpha    -        -      -     -\n"
                "bravo    -  8.0 MiB      -     -\n"
                "carol    -        -      -     -\n"
            ),
        ),
        (
            ["set", "alpha", "--pool", "2", "--weight", "100"],
            "alpha pool 2: weight 100, priority normal\n",
        ),
        (
            ["set", "alpha", "--weight", "300"],
            (
                "alpha: weight 300, cap 8.0 MiB, reserve none, compress on, borrow off, "
                "priority normal, sharing group:web\n"
            ),
        ),
    ],
)
def test_commands_say_what_is_now(
    hypervisor: Standin, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    """One line; Xen's spellings say as much as Xen's did."""
    assert tmem(*words) == 0

    assert capsys.readouterr().out == says
    del hypervisor


# --- flush --------------------------------------------------------------------------------------


def test_flush_asks_again_for_what_is_left(
    hypervisor: Standin, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slice by slice, until there is enough and the host has it."""
    hypervisor.answers["flush"] = lambda question: {
        "flushed_pages": 300 if question["size_bytes"] else 0,
        "freed_bytes": min(1 << 20, question["size_bytes"]),
        "released_bytes": 4096,
        "more": question["size_bytes"] > 0,
    }

    assert tmem("flush", "all", "2560K") == 0

    sizes = [question["size_bytes"] for question in hypervisor.asked("flush")]
    assert sizes == [2560 << 10, 1536 << 10, 512 << 10, 0]
    assert capsys.readouterr().out == (
        "flushed 900 pages, 2.5 MiB set free, 16.0 KiB given back to the host\n"
    )


def test_flush_says_when_nothing_is_left(
    hypervisor: Standin, capsys: pytest.CaptureFixture[str]
) -> None:
    """Less than was asked for is no failure, but it is said."""
    slices = iter([(1, True), (0, True), (1, False)])

    def answer(_question: Record) -> Record:
        pages, more = next(slices)
        freed = {"freed_bytes": pages * 4096, "released_bytes": pages * 4096}
        return {"flushed_pages": pages, **freed, "more": more}

    hypervisor.answers["flush"] = answer

    assert tmem("flush", "alpha", "1M") == 0

    out, err = capsys.readouterr()
    assert out == "flushed 2 pages, 8.0 KiB set free, 8.0 KiB given back to the host\n"
    assert err == "tmem: that is less than 1.0 MiB: all that is left is persistent\n"
    assert {question["guest"] for question in hypervisor.asked("flush")} == {"alpha"}


def test_flush_gives_up_on_a_hypervisor_that_frees_nothing(hypervisor: Standin) -> None:
    """The loop has an end whatever is answered."""
    hypervisor.answers["flush"] = lambda _question: {
        "flushed_pages": 0,
        "freed_bytes": 0,
        "released_bytes": 0,
        "more": True,
    }

    assert tmem("flush", "all", "1M") == 0

    assert 1 < len(hypervisor.asked("flush")) <= 100


# --- destroy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "exit_code", "asked"), [("y", 0, 1), ("n", 1, 0), ("", 1, 0)])
def test_destroy_asks_on_a_terminal(
    hypervisor: Standin, key: str, exit_code: int, asked: int
) -> None:
    """With what would be lost; only a yes is a yes."""
    ours, theirs = pty.openpty()
    os.write(ours, f"{key}\n".encode())
    try:
        done = subprocess.run(
            command("destroy", "alpha"),
            env=environment() | {ENVIRONMENT: os.environ[ENVIRONMENT]},
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)

    assert "destroy all pools of alpha with 1,239 pages, 5 of them persistent?" in done.stderr
    assert done.returncode == exit_code
    assert len(hypervisor.asked("destroy")) == asked


# --- no -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["list", "zulu"], "there is no guest 'zulu'; there are alpha, bravo, carol"),
        (["list", "7"], "there is no guest '7'"),
        (["freeze"], "say whom to freeze: a guest's name, or --all"),
        (["thaw", "alpha", "--all"], "say whom to thaw"),
        (["set", "alpha"], "say what to set: --weight, "),
        (["set", "alpha", "--pool", "1"], "say what to set: --weight, "),
        (["set", "zulu", "--weight", "1"], "no guest 'zulu'"),
        (["set", "alpha", "--weight", "0"], "--weight"),
        (["set", "alpha", "--weight", "much"], "--weight"),
        (["set", "alpha", "--cap", "much"], "--cap: 'much' is no size"),
        (["set", "alpha", "--cap", "0"], "write 'none'"),
        (["set", "alpha", "--compress", "yes"], "--compress"),
        (["set", "alpha", "--priority", "urgent"], "--priority"),
        (["balloon", "zulu"], "there is no guest 'zulu'; there are alpha, bravo, carol"),
        (["balloon", "zulu", "8M"], "no guest 'zulu'"),
        (["balloon", "alpha", "much"], "SIZE: 'much' is no size"),
        (["balloon", "alpha", "-8M"], "-8"),
        (["balloon", "alpha", "0"], "write 'none'"),
        (["balloon", "alpha", "4095"], "less than 16 TiB"),
        (["balloon", "alpha", "16T"], "less than 16 TiB"),
        (["schedule", "random"], "random"),
        (["flush", "alpha"], "Missing argument"),
        (["flush", "alpha", "1.5M"], "SIZE: '1.5M' is no size"),
        (["flush", "zulu", "1M"], "no guest 'zulu'"),
        (["auth", "allow", "alpha", "abc"], "'abc' is no uuid; write 32 hex digits"),
        (["auth", "allow", "alpha", f"{UUID[:-1]}g"], "is no uuid"),
        (["auth", "allow", "alpha", "f" * 32], "means 'no uuid'"),
        (["auth", "allow", "alpha", UUID, "--reader", "--writer"], "not both"),
        (["auth", "deny", "zulu", UUID], "no guest 'zulu'"),
        (["auth", "dance"], "No such command 'dance'"),
        (["destroy", "alpha"], "there is no terminal to ask on; say --yes"),
        (["destroy", "zulu", "--yes"], "no guest 'zulu'"),
    ],
)
def test_bad_commands_are_one_line_and_change_nothing(
    hypervisor: Standin,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    says: str,
) -> None:
    """Exit code 64, what is wrong, and no question but for who is there."""
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)

        assert tmem(*words) == 64

    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("tmem: ")
    assert says in line
    assert {question["verb"] for question in hypervisor.questions} <= {"list"}


def test_a_no_of_the_hypervisor_is_passed_on(
    hypervisor: Standin, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its own words."""
    hypervisor.answers["set"] = lambda _question: {"error": "17.0 MiB are more than the arena has"}

    assert tmem("set", "alpha", "--reserve", "17M") == 64

    assert capsys.readouterr().err == "tmem: alpha: 17.0 MiB are more than the arena has\n"


@pytest.mark.parametrize("words", [["list"], ["freeze", "--all"], ["auth", "list"]])
def test_without_a_cluster_there_is_nobody_to_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Exit code 69."""
    monkeypatch.setenv(ENVIRONMENT, "/nowhere")

    assert tmem(*words) == 69

    assert "no cluster is running" in capsys.readouterr().err


def test_a_cluster_without_tmem_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The first half of a measured run has no hypervisor."""
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    directory = ClusterDirectory(tmp_path)
    directory.make()
    start = process_start(os.getpid())
    assert start is not None
    directory.write(ClusterRecord("x", 0, [], os.getpid(), start))

    assert tmem("list") == 69

    assert "runs without tmem" in capsys.readouterr().err
