"""README.md and tools/MANUAL.md are run: shell commands, the cluster file, the Python program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from guests.commands import COMMANDS
from guests.proc import FILES
from guests.selfballoon import Knobs
from guests.shell import WAITING_COMMANDS
from ipc.errors import ExitCode
from tests.support.clusters import ROOT, environment, short_folder
from tests.support.tools import need_tool
from tools.cli import app
from tools.topology import PARAMETERS

DOCUMENTS = {path: path.read_text() for path in (ROOT / "README.md", ROOT / "tools/MANUAL.md")}
README = "\n".join(DOCUMENTS.values())
"""All that a user reads."""


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with what the README tells the reader to write, and `tmem` and `python` in bin."""
    need_tool("mke2fs")
    (cluster_file,) = _blocks("toml")
    (program,) = _blocks("python")
    with short_folder() as path:
        (path / "cluster.toml").write_text(cluster_file)
        (path / "program.py").write_text(program)
        (path / "bin").mkdir()
        for name, words in (("tmem", "-m tools"), ("python", "")):
            script = path / "bin" / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
            script.chmod(0o755)
        yield path


@pytest.mark.cluster
@pytest.mark.parametrize("number", range(len(_blocks("sh"))))
def test_commands_of_the_readme_work(folder: Path, number: int) -> None:
    """Every line of every block, as a shell runs them."""
    values = environment()
    values["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"

    done = subprocess.run(
        ["sh", "-eux"],
        input=_blocks("sh")[number],
        cwd=folder,
        env=values,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_links_of_the_readme_lead_somewhere() -> None:
    """To a file, and to a heading in it."""
    links = [
        (path, *target.partition("#")[::2])
        for path, text in DOCUMENTS.items()
        for target in re.findall(r"\]\(([^)]+)\)", text)
    ]

    assert any(anchor for _, _, anchor in links)
    for path, target, anchor in links:
        text = (path.parent / target).read_text()
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        names = {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}
        assert not anchor or anchor in names, (path.name, target, anchor)


def test_readme_lists_every_exit_code_and_parameter() -> None:
    """What commands may answer and what topologies take is documented completely."""
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}

    assert listed == {int(code) for code in ExitCode}
    for name in PARAMETERS:
        assert f"`{name}`" in README


def test_help_is_shown_as_it_is_written() -> None:
    """Words in brackets would be taken for markup, and left out."""
    found: list[str] = []

    def walk(command: Any, path: str) -> None:
        texts = [command.help, *(getattr(one, "help", None) for one in command.params)]
        found.extend(f"{path}: {text}" for text in texts if "[" in (text or ""))
        for name, one in getattr(command, "commands", {}).items():
            walk(one, f"{path} {name}")

    walk(typer.main.get_command(app), "tmem")

    assert found == []


def test_readme_knows_what_a_guest_offers() -> None:
    """Every command, every knob, every file that is made when it is read."""
    for name in {*COMMANDS, *WAITING_COMMANDS} - {"modules"}:
        assert re.search(rf"\b{name}\b", README), name
    for knob in vars(Knobs()):
        assert f"`{knob}`" in README, knob
    for path in FILES:
        assert path in README, path


def test_files_that_the_readme_names_exist() -> None:
    """A reader who follows a name finds it."""
    named = set(re.findall(r"`((?:ipc|guests|fs|hypervisor)/[\w/.]+|LICENSE)`", README))

    assert {"ipc/ABI.md", "LICENSE"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []
