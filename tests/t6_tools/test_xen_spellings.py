"""The administrator's commands as hands know them that know Xen's `xl`, and what they print."""

from __future__ import annotations

import struct

import pytest

from ipc.codec import Record
from tests.support.standin import DIGITS, UUID, Standin
from tools.cli import main as tmem_main
from tools.cli.xen import main as xen
from tools.rundir import ENVIRONMENT


def tmem(*words: str) -> int:
    """The command's exit code, in this process."""
    return tmem_main(list(words))


SHORT = """\
G=Tt:99,Ta:2000,Et:3,Fp:3
S=SI:4,PT:ES,U0:{u0},U1:{u1},SC:1,SC:2
C=CI:1,ww:300,co:1,fr:1
P=CI:1,PI:0,PT:EP,U0:0,U1:0
P=CI:1,PI:1,PT:PP,U0:0,U1:0
P=CI:1,PI:2,PT:ES,U0:{u0},U1:{u1}
C=CI:2,ww:100,co:0,fr:0
"""
LONG = """\
G=Tt:99,Ta:2000,Et:3,Fp:3,Ec:1234,Oc:2,Pc:34,Fc:2000
S=SI:4,PT:ES,U0:{u0},U1:{u1},SC:1,SC:2,Pc:34,Oc:2
C=CI:1,ww:300,co:1,fr:1,Ec:1234
P=CI:1,PI:0,PT:EP,U0:0,U1:0,Pc:1200,Oc:7
P=CI:1,PI:1,PT:PP,U0:0,U1:0,Pc:5,Oc:1
P=CI:1,PI:2,PT:ES,U0:{u0},U1:{u1},Pc:34,Oc:2
C=CI:2,ww:100,co:0,fr:0,Ec:0
"""
U0, U1 = (f"{word:x}" for word in struct.unpack("<QQ", bytes.fromhex(DIGITS)))


@pytest.mark.parametrize(
    ("words", "records"),
    [
        (["tmem-list", "-a"], SHORT),
        (["tmem-list", "-a", "-l"], LONG),
        (["tmem-list", "-la"], LONG),
        (["list", "-l"], LONG),
        (["tmem-list", "bravo"], "C=CI:2,ww:100,co:0,fr:0\n"),
        (["tmem-list", "-l", "2"], "C=CI:2,ww:100,co:0,fr:0,Ec:0\n"),
        (["list", "bravo", "--long"], "C=CI:2,ww:100,co:0,fr:0,Ec:0\n"),
    ],
)
def test_records_are_xens(
    hypervisor: Standin, capsys: pytest.CaptureFixture[str], words: list[str], records: str
) -> None:
    """Letters, keys, order and hexadecimal words as scripts know them."""
    assert tmem(*words) == 0

    assert capsys.readouterr().out == records.format(u0=U0, u1=U1)
    del hypervisor


@pytest.mark.parametrize(
    ("words", "verb", "questions"),
    [
        (["tmem-freeze", "-a"], "freeze", [{}]),
        (["tmem-freeze", "alpha"], "freeze", [{"guest": "alpha"}]),
        (["tmem-thaw", "-a"], "thaw", [{}]),
        (
            ["tmem-set", "alpha", "-w", "7", "-c", "3", "-p", "1"],
            "set",
            [{"guest": "alpha", "weight": 7, "cap_bytes": 3 << 20, "compress": True}],
        ),
        (
            ["tmem-set", "2", "-c0", "-p0"],
            "set",
            [{"guest": "bravo", "cap_bytes": 0, "compress": False}],
        ),
        (["tmem-set", "2", "-c", "512K"], "set", [{"guest": "bravo", "cap_bytes": 1 << 19}]),
        (
            ["tmem-set", "-a", "-w", "1"],
            "set",
            [{"guest": name, "weight": 1} for name in ("alpha", "bravo", "carol")],
        ),
        *(
            (
                ["tmem-shared-auth", *words],
                "auth",
                [{"action": "allow", "guest": "alpha", "uuid": DIGITS, "role": "writer"}],
            )
            for words in (
                ["alpha", "-u", UUID, "-A", "1"],
                ["alpha", "-u", UUID, "-a", "1"],
                ["-u", UUID, "-a", "1", "alpha"],
                ["-a1", "-u", UUID, "1"],
            )
        ),
        (
            ["tmem-shared-auth", "2", "-u", UUID, "-a", "0"],
            "auth",
            [{"action": "deny", "guest": "bravo", "uuid": DIGITS}],
        ),
        (
            ["tmem-shared-auth", "-a", "-u", UUID, "-A", "0"],
            "auth",
            [
                {"action": "list", "uuid": DIGITS},
                {"action": "deny", "guest": "alpha", "uuid": DIGITS},
            ],
        ),
    ],
)
def test_commands_ask_for_what_was_said(
    hypervisor: Standin, words: list[str], verb: str, questions: list[Record]
) -> None:
    """1 allows, in either of Xen's spellings; a guest may be its number."""
    assert tmem(*words) == 0

    assert hypervisor.asked(verb) == questions


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tmem-freeable"], "5\n"),
        (["tmem-freeze", "-a"], ""),
    ],
)
def test_commands_say_as_much_as_xens_did(
    hypervisor: Standin, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    """Which is little."""
    assert tmem(*words) == 0

    assert capsys.readouterr().out == says
    del hypervisor


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tmem-list"], "tmem-list: give -a or a domain"),
        (["tmem-list", "-a", "alpha"], "tmem-list: give -a or a domain"),
        (["tmem-freeze"], "tmem-freeze: give -a or a domain"),
        (["tmem-set", "alpha"], "tmem-set: say what to set"),
        (["tmem-set", "alpha", "-p", "2"], "-p"),
        (["tmem-shared-auth", "alpha"], "tmem-shared-auth: give -u UUID, and -A 1"),
        (["tmem-shared-auth", "alpha", "-u", UUID], "-A 1 to allow or -A 0 to deny"),
        (["tmem-shared-auth", "alpha", "-u", UUID, "-A", "2"], "-A 1 to allow"),
        (["tmem-shared-auth", "alpha", "bravo", "-u", UUID, "-A", "1"], "'bravo' makes no sense"),
        (["tmem-shared-auth", "alpha", "-x", "-u", UUID, "-A", "1"], "'-x' makes no sense"),
    ],
)
def test_bad_commands_are_one_line_and_change_nothing(
    hypervisor: Standin, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    """Exit code 64, what is wrong, and no question but for who is there."""
    assert tmem(*words) == 64

    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("tmem: ")
    assert says in line
    assert {question["verb"] for question in hypervisor.questions} <= {"list"}


@pytest.mark.parametrize("words", [["tmem-list", "-a"], ["tmem-freeable"]])
def test_without_a_cluster_there_is_nobody_to_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Exit code 69."""
    monkeypatch.setenv(ENVIRONMENT, "/nowhere")

    assert tmem(*words) == 69

    assert "no cluster is running" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tmem-list", "tmem-freeable"])
def test_xens_programs_are_called_by_their_names(
    hypervisor: Standin,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """What the entry points of pyproject.toml do."""
    monkeypatch.setattr(
        "sys.argv", [f"/usr/local/bin/{name}", *(["-a"] if name == "tmem-list" else [])]
    )

    assert xen() == 0

    assert capsys.readouterr().out.startswith("G=Tt:99" if name == "tmem-list" else "5\n")
    del hypervisor
