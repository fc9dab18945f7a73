"""The built-in commands: Unix's output, messages and exit codes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests.kernel import Kernel
from guests.shell import Execution, Result
from tests.t4_guest.worlds import running_kernel, write_file


@pytest.fixture
def kernel(image: Path) -> Iterator[Kernel]:
    """A guest with one file."""
    with running_kernel(image) as running:
        write_file(running, "/a", b"text\n")
        yield running


class Shell:
    """Its commands, one at a time."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def run(self, argv: list[str]) -> Result:
        """Run a command to its end."""
        execution = Execution(self.kernel, argv)
        while (result := execution.step()) is None:
            pass
        return result


@pytest.fixture
def shell(kernel: Kernel) -> Shell:
    """Its commands."""
    return Shell(kernel)


def done(result: Result) -> str:
    """The output of a command that must succeed."""
    assert result.exit_code == 0, result
    assert result.stderr == b""
    return result.stdout.decode()


def failed(result: Result, exit_code: int = 1) -> str:
    """The message of a command that must fail."""
    assert result.exit_code == exit_code, result
    return result.stderr.decode()


def test_cat_goes_on_after_a_missing_file(shell: Shell) -> None:
    """As on Unix: one message, the rest shown, exit code 1."""
    result = shell.run(["cat", "/nothing", "/a", "/"])

    assert result.stdout == b"text\n"
    assert failed(result) == ("cat: /nothing: No such file or directory\ncat: /: Is a directory\n")


def test_unknown_command_and_wrong_use(shell: Shell) -> None:
    """127 and 2."""
    assert "dance: command not found" in failed(shell.run(["dance"]), 127)
    assert "usage: cat FILE" in failed(shell.run(["cat"]), 2)
    assert "invalid option -- 'q'" in failed(shell.run(["ls", "-q"]), 2)
    assert "extra operand" in failed(shell.run(["mv", "/a", "/b", "/c"]), 2)
    assert "unknown predicate" in failed(shell.run(["find", "/", "-newer", "/a"]), 2)


def test_sha256sum_prints_what_the_host_would(shell: Shell) -> None:
    """Hash, two blanks, path."""
    digest = hashlib.sha256(b"text\n").hexdigest()

    assert done(shell.run(["sha256sum", "/a"])) == f"{digest}  /a\n"


def test_tree_is_made_moved_linked_and_removed(shell: Shell) -> None:
    """One life of a directory tree."""
    assert done(shell.run(["mkdir", "-p", "/d/e/f"])) == ""
    assert done(shell.run(["mkdir", "-p", "/d/e/f"])) == ""
    assert "File exists" in failed(shell.run(["mkdir", "/d"]))
    assert done(shell.run(["cp", "/a", "/d/e"])) == ""
    assert done(shell.run(["mv", "/d/e/a", "/d/e/f/b"])) == ""
    assert done(shell.run(["ln", "/a", "/d/hard"])) == ""
    assert done(shell.run(["ln", "-s", "e/f/b", "/d/soft"])) == ""
    assert done(shell.run(["cat", "/d/soft"])) == "text\n"
    assert done(shell.run(["find", "/d"])).split() == [
        "/d",
        "/d/e",
        "/d/hard",
        "/d/soft",
        "/d/e/f",
        "/d/e/f/b",
    ]
    assert done(shell.run(["find", "/d", "-type", "l"])) == "/d/soft\n"
    assert done(shell.run(["find", "/", "-name", "?"])).split() == [
        "/a",
        "/d",
        "/d/e",
        "/d/e/f",
        "/d/e/f/b",
    ]
    assert "Is a directory" in failed(shell.run(["rm", "/d"]))
    assert "Directory not empty" in failed(shell.run(["rmdir", "/d"]))
    assert done(shell.run(["rm", "-r", "/d"])) == ""
    assert "No such file" in failed(shell.run(["rm", "/d"]))
    assert done(shell.run(["rm", "-f", "/d"])) == ""
    assert done(shell.run(["ls"])).split() == ["a", "lost+found"]


def test_copy_onto_itself_is_refused(shell: Shell) -> None:
    """The file would be emptied first."""
    assert "are the same file" in failed(shell.run(["cp", "/a", "/a"]), 2)
    assert done(shell.run(["cat", "/a"])) == "text\n"


def test_ls_and_stat_tell_type_and_size(shell: Shell) -> None:
    """A row a file."""
    assert done(shell.run(["ls", "-l", "/a"])).startswith("-rw-r--r--   1     0     0         5 20")
    assert "Size: 5 " in done(shell.run(["stat", "/a"]))
    assert "directory" in done(shell.run(["stat", "/"]))


def test_df_and_virtual_files(shell: Shell, kernel: Kernel) -> None:
    """Figures of the guest itself."""
    total = kernel.memory.budget.total * 4
    rows = {
        line.split()[0]: int(line.split()[1])
        for line in done(shell.run(["cat", "/proc/meminfo"])).splitlines()
    }

    assert rows["MemTotal:"] == total
    parts = ("MemFree:", "Cached:", "Buffers:", "Transfer:", "TmemWindow:")
    assert sum(rows[name] for name in parts) == total
    assert "nr_free_pages" in done(shell.run(["cat", "/proc/vmstat"]))
    assert done(shell.run(["cat", "/sys/kernel/debug/cleancache/puts"])) == "0\n"
    assert "No such file" in failed(shell.run(["cat", "/sys/kernel/debug/cleancache/x"]))
    assert done(shell.run(["df"])).count("\n") == 2
    assert done(shell.run(["df", "-i"])).count("\n") == 2
    assert done(shell.run(["sync"])) == ""


def test_programs_fill_memory_and_verify_it(
    shell: Shell,
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
    expect_warning: Callable[[str], None],
) -> None:
    """Other commands show the guest meanwhile; who was killed is said, what is wrong fails."""
    expect_warning("event=killed why=Out of memory")
    monkeypatch.setattr("guests.workcommands.SLICE_SECONDS", 0.0)
    execution = Execution(kernel, ["programs", "programs=2", "pages=20", "passes=1", "seed=3"])
    for _ in range(40):
        assert execution.step() is None
    shown = done(shell.run(["cat", "/proc/meminfo"]))
    assert "Committed_AS:        160 kB" in shown
    while (result := execution.step()) is None:
        pass
    assert done(result) == "120 accesses, 0 wrong\n"
    assert len(kernel.userland.processes) == 0

    too_many = f"pages={kernel.memory.budget.frames}"
    result = shell.run(["programs", "programs=2", too_many, "passes=0", "writes=0.1"])
    assert result.exit_code == 0
    assert result.stderr.startswith(b"programs: Out of memory: Killed process ")

    for words, says in (
        (["page=3"], "not a parameter and a number: 'page=3'"),
        (["pages=many"], "not a parameter and a number: 'pages=many'"),
        (["pages=0"], "parameter pages must be a number from 1 to 1000000, not 0"),
        (["pages=1.5"], "parameter pages must be a whole number"),
        (["3"], "not a parameter and a number: '3'"),
        (["seed=inf"], "not a parameter and a number: 'seed=inf'"),
        (["seed=nan"], "not a parameter and a number: 'seed=nan'"),
    ):
        assert says in failed(shell.run(["programs", *words]), 2)
    monkeypatch.setattr("guests.workloads.programs._Program.is_right", lambda *_: False)
    result = shell.run(["programs", "programs=1", "pages=2", "passes=0"])
    assert result.stdout == b"4 accesses, 2 wrong\n"
    assert "program0 page 0 does not hold what was written" in failed(result)
    assert kernel.findings.mismatches == 2
