"""Lock value blocks under torture: three processes with real lock managers and real links count in
the value of one lock, two of them die with it in EX and come back.

Who gets the lock sees what was written last, or is told that it is lost. The random lives of
`tests.t3_fs.dlm.campaign` say the same of lost, late and doubled messages.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fs.block.device import BLOCK_BYTES
from fs.block.file import FileDevice
from fs.ocfs2.mkfs import Parameters, blocks_needed, make_volume
from tests.support.clusters import ROOT, environment, short_folder, wait_until
from tests.support.counting_node import NAMES

pytestmark = pytest.mark.cluster

FIRST_SEED = int(os.environ.get("TMEM_RACES_FIRST", "1"))
SEEDS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("TMEM_RACES", "1")))
ROUNDS = 150
NEVER = -1


@dataclass
class Use:
    """One use of the lock."""

    who: str
    mode: str
    value: int | None
    begin_ns: int
    written: int | None = None
    end_ns: int | None = None


@dataclass
class Story:
    """What a process wrote down."""

    who: str
    uses: list[Use] = field(default_factory=list)
    ended: bool = False


def read_story(who: str, path: Path) -> Story:
    """All whole lines."""
    story = Story(who)
    for text in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            match line["at"]:
                case "has":
                    story.uses.append(Use(who, line["mode"], line["value"], line["ns"]))
                case "sets":
                    story.uses[-1].written = line["value"]
                case "drops":
                    story.uses[-1].end_ns = line["ns"]
                case "ends":
                    story.ended = True
    return story


def judge(stories: Iterable[Story], deaths_ns: list[int]) -> Iterator[str]:
    """Uses that exclude each other, and values that are neither the last one nor told as lost."""
    uses = sorted((use for story in stories for use in story.uses), key=lambda use: use.begin_ns)
    newest: int | None = 0
    written_ns = 0
    open_until_ns = {"PR": 0, "EX": 0}
    for use in uses:
        others = open_until_ns.values() if use.mode == "EX" else [open_until_ns["EX"]]
        if use.begin_ns < max(others):
            yield f"{use} begins while another one lasts"
        open_until_ns[use.mode] = max(open_until_ns[use.mode], use.end_ns or use.begin_ns)
        if use.value is None:
            if not any(written_ns < death_ns < use.begin_ns for death_ns in deaths_ns):
                yield f"{use} is told that the value is lost, and nobody died since it was written"
        elif use.value != newest:
            yield f"{use} does not see {newest}"
        if use.written is not None:
            # Whoever died here had it in EX: what it wrote is lost with it.
            newest = use.written if use.end_ns is not None else None
            written_ns = use.begin_ns


class Counters:
    """The processes on one volume."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = folder / "image"
        parameters = Parameters(slots=3, uuid=bytes(range(16)), generation=5, now_s=1)
        with self.image.open("xb") as file:
            file.truncate(blocks_needed(parameters) * BLOCK_BYTES)
        device = FileDevice(self.image)
        make_volume(device, parameters, fresh=True)
        device.close()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.stories: list[str] = []

    def start(self, number: int, seed: int, dies_at: int, members: int) -> str:
        """One node, which waits for so many members; the name of its story."""
        who = f"{NAMES[number]}.{len(self.stories)}"
        arguments = [self.image, self.folder, number, seed, ROUNDS, dies_at, members]
        with self.path(who).open("wb") as out, self.path(f"{who}.errors").open("wb") as errors:
            self.processes[who] = subprocess.Popen(
                [sys.executable, "-m", "tests.support.counting_node", *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=errors,
                env=environment(),
                cwd=ROOT,
            )
        self.stories.append(who)
        return who

    def path(self, who: str) -> Path:
        """Where a story is written."""
        return self.folder / who

    def story(self, who: str) -> Story:
        """So far."""
        return read_story(who, self.path(who))

    def await_death(self, who: str) -> int:
        """Wait until it has killed itself; a time before the others can have seen it."""
        self.processes[who].wait(timeout=60)
        assert self.processes[who].returncode < 0, self.path(f"{who}.errors").read_text()
        last = self.story(who).uses[-1]
        assert last.mode == "EX" and last.end_ns is None
        return last.begin_ns + 1

    def end(self) -> None:
        """All leave."""
        for process in self.processes.values():
            assert process.stdin is not None
            process.stdin.close()
        for who, process in self.processes.items():
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError(f"{who} does not end") from None


@pytest.fixture
def counters() -> Iterator[Counters]:
    """None of them started."""
    with short_folder() as folder:
        made = Counters(folder)
        yield made
        made.end()


@pytest.mark.parametrize("seed", SEEDS)
def test_value_is_the_last_one_or_told_as_lost(counters: Counters, seed: int) -> None:
    """Nothing is counted twice, and no death brings an old value back."""
    # All three from the beginning: a value is lost with the last one who knew that it was written.
    survivors = [counters.start(0, seed * 10, NEVER, 3)]
    victims = {
        number: counters.start(number, seed * 10 + number, 40 + (seed * 7 + number * 30) % 70, 3)
        for number in (1, 2)
    }
    deaths_ns = []
    for number, who in victims.items():
        deaths_ns.append(counters.await_death(who))
        survivors.append(counters.start(number, seed * 10 + number + 5, NEVER, 2))
    wait_until(lambda: all(counters.story(who).ended for who in survivors), "the last round", 90)
    stories = [counters.story(who) for who in counters.stories]

    assert list(judge(stories, deaths_ns)) == [], f"seed {seed}"
    uses = [use for story in stories for use in story.uses]
    assert any(use.value is None for use in uses), "each death is told to somebody"
    assert {story.who for story in stories if any(use.written for use in story.uses)} == {
        *counters.stories
    }
