"""Where a scenario is played: a cluster of its own, of real processes, in a folder of its own.

A scenario starts a cluster (`Stage.cluster`) and gives its guests work, step by step: `attack` runs
the adversary of a guest, `check` lets a victim compare its pages.  Both are counted in the tally.
Nothing outside the folder and the cluster is touched, also with the defence off.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from guests.adversary import WORKLOAD
from guests.node import NodeSpec
from ipc.codec import Record
from ipc.errors import Disconnected, ExitCode
from ipc.jail import Mode
from tools.administer import ask_politely
from tools.audit import AuditReader, Event
from tools.cluster import Cluster, ClusterPlan, GuestPlan, check_limits
from tools.image import build_image, copy_image
from tools.interrupts import Interrupts
from tools.jails import missing_here
from tools.rundir import ClusterDirectory
from tools.scenario.model import Figure, Scene, Tally

MIB: Final = 1 << 20
WITNESS: Final = "guests.adversaries.witness"
_MEMORY_BYTES: Final = MIB
_PATIENCE_SECONDS: Final = 60.0
"""For one piece of work: far beyond what it takes, on a machine that is busy with others."""
_ANSWER_SECONDS: Final = 15.0
_POLL_SECONDS: Final = 0.02
_FILES: Final = 6
_LOG: Final = re.compile(r"(/\S+\.log)\b")
JAILED: Final = ("operation not permitted", "permission denied")
"""What a process in a jail is told: EPERM by the filter of system calls, EACCES by Landlock."""


Command = Callable[[list[str]], int]


@dataclass(frozen=True)
class Player:
    """A guest on the stage; `adversary` is its module, a witness without one."""

    name: str
    adversary: str = WITNESS
    memory_bytes: int = _MEMORY_BYTES
    image: Path | None = None
    node: NodeSpec | None = None
    cleancache: bool = False
    frontswap: bool = False


@dataclass(frozen=True)
class Grant:
    """Who may share the pool of a uuid."""

    guest: str
    uuid: bytes
    role: str = "writer"

    def question(self) -> Record:
        """For the hypervisor's control socket."""
        return {
            "verb": "auth",
            "action": "allow",
            "guest": self.guest,
            "uuid": self.uuid.hex(),
            "role": self.role,
        }


@functools.cache
def whole_jail() -> Mode:
    """The strictest jail that this machine can give."""
    return "auto" if missing_here() else "strict"


def adversary(noun: str) -> str:
    """The module of an attack."""
    return f"guests.adversaries.{noun}"


@dataclass
class Stage:
    """What a scenario is run with: `defence` on or off, a `seed`, and whom to tell what happens.

    `command` runs a command line of `tmem` and has its exit code; it is given, because the commands
    know the scenarios and not the other way round.
    """

    folder: Path
    cache: Path
    defence: bool
    seed: int
    interrupts: Interrupts
    tell: Callable[[str], None] = lambda _line: None
    watch: Callable[[Scene], None] = lambda _scene: None
    command: Command | None = None
    tally: Tally = field(default_factory=Tally)
    events: list[str] = field(default_factory=list)
    scenes: list[Scene] = field(default_factory=list)
    clusters: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def say(self, line: str) -> None:
        """Something happened."""
        self.events.append(line)
        self.tell(line)

    def show(self, scene: Scene) -> None:
        """How things stand: kept for the report, and shown to who watches."""
        self.scenes.append(scene)
        self.watch(scene)

    def problem(self, line: str) -> None:
        """Something went wrong that keeps the scenario from being judged.  A log that it names goes
        with the cluster, but for its last line."""
        for path in _LOG.findall(line):
            with contextlib.suppress(OSError, IndexError):
                line += f" ({Path(path).read_text(errors='replace').splitlines()[-1]})"
        self.tally.problems.append(line)
        self.tell(f"problem: {line}")

    @property
    def jail(self) -> Mode:
        """Of all guests where the jail is the defence."""
        return whole_jail() if self.defence else "off"

    @contextlib.contextmanager
    def cluster(
        self,
        *players: Player,
        arena_bytes: int = 4 * MIB,
        hypervisor: Mapping[str, Any] | None = None,
        questions: Sequence[Record] = (),
        grants: Sequence[Grant] = (),
        jail: Mode | None = None,
    ) -> Iterator[World]:
        """A cluster that is up, and goes in the end; guests are jailed if nothing else is said."""
        self.clusters += 1
        name = f"scn{os.getpid()}-{self.clusters}"
        directory = ClusterDirectory(self.folder / f"c{self.clusters}")
        directory.check()
        check_limits(len(players), sum(one.memory_bytes for one in players), arena_bytes)
        directory.images.mkdir(mode=0o700, parents=True, exist_ok=True)
        guests = [self._guest(player, directory) for player in players]
        told = [*questions, *(grant.question() for grant in grants)]
        plan = ClusterPlan(name, guests, arena_bytes, hypervisor or {}, told, jail or whole_jail())
        try:
            with Cluster(plan, directory, self.interrupts) as cluster:
                world = World(self, cluster, directory)
                yield world
                world.look()
        finally:
            shutil.rmtree(directory.images, ignore_errors=True)

    def _guest(self, player: Player, directory: ClusterDirectory) -> GuestPlan:
        image = player.image
        if image is None:
            image = directory.images / f"{player.name}.img"
            copy_image(self.small_image(), image)
        return GuestPlan(
            player.name,
            player.memory_bytes,
            image,
            node=player.node,
            cleancache=player.cleancache,
            frontswap=player.frontswap,
            adversary=player.adversary,
        )

    def small_image(self) -> Path:
        """A disk for guests that hardly use theirs."""
        tree = self.cache / "small"
        write_tree(tree, _FILES, 8192, seed=1)
        return build_image(str(tree), MIB, "small", self.cache).path


def write_tree(folder: Path, files: int, file_bytes: int, seed: int) -> None:
    """A tree of files of random bytes, if it is not there yet."""
    if folder.is_dir():
        return
    numbers = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(files):
        (folder / f"file{number:03}").write_bytes(numbers.randbytes(file_bytes))


class World:
    """A cluster on the stage."""

    def __init__(self, stage: Stage, cluster: Cluster, directory: ClusterDirectory) -> None:
        self.stage = stage
        self.cluster = cluster
        self.directory = directory
        self.expendable: set[str] = set()
        """Guests whose end is no problem: attackers that get what they deserve."""
        self._ended: set[str] = set()
        """Guests that we end ourselves."""
        self._tally = stage.tally

    # --- the administrator

    def ask(self, verb: str, **fields: Any) -> Record:
        """Ask the hypervisor."""
        return ask_politely(self.directory, {"verb": verb, **fields}, ExitCode.USAGE)

    def audit(self) -> list[str]:
        """The lines of the audit log."""
        try:
            return (self.directory.logs / "audit.log").read_text().splitlines()
        except OSError:
            return []

    def reports(self) -> list[Event]:
        """Wrong pages that nodes have reported, as far as the audit log has a line for each."""
        reader = AuditReader(self.directory, events=("reported",))
        return [event for _, event in reader.events(follow=False)]

    def judge_reports(self, putter: str) -> None:
        """Pages were caught: the audit log must say that this guest has put some of them."""
        counted = self.ask("stats")["audit"]["events"].get("reported", 0)
        events = self.reports()
        putters = Counter(event.get("put_by", "nobody any more") for event in events)
        told = ", ".join(f"{name} {count}" for name, count in putters.most_common())
        self._tally.figures["audit log"] = Figure(
            f"{counted:,} pages reported, {len(events):,} lines, put by: {told or '-'}",
            {"reported_pages": counted, "lines": len(events), "put_by": dict(putters)},
        )
        if putter not in putters:
            self.stage.problem(f"the audit log does not name {putter}")

    def pid(self, name: str) -> int:
        """A guest's process."""
        record = self.directory.read()
        assert record is not None
        return next(guest.pid or 0 for guest in record.guests if guest.name == name)

    def look(self) -> None:
        """Note who has died, and that the hypervisor has not."""
        for line in self.cluster.watch():
            whose = line.split()[1] if line.split()[:1] == ["guest"] else ""
            if whose in self._ended:
                self._ended.discard(whose)
                self.stage.say(f"administrator: ends {whose}")
            elif whose in self.expendable:
                self.stage.say(line)
            else:
                self.stage.problem(line)

    def end(self, name: str) -> None:
        """End a guest, if it has not ended, and wait until it has."""
        if name in self.cluster.alive:
            self._ended.add(name)
            self.cluster.signal(name, signal.SIGKILL)
        while name in self.cluster.alive:
            self.look()
            time.sleep(_POLL_SECONDS)

    # --- work

    def begin(self, name: str, workload: str = WORKLOAD, **parameters: Any) -> str | None:
        """Give a guest work; why it was not taken, which is a problem."""
        question = {
            "verb": "run",
            "workload": workload,
            "seed": self.stage.random.getrandbits(32),
            "parameters": parameters,
        }
        try:
            answer = self.cluster.ask_guest(name, question, timeout_seconds=_PATIENCE_SECONDS)
        except Disconnected as error:
            answer = {"error": str(error)}
        if answer.get("accepted"):
            return None
        refusal = str(answer.get("error"))
        self.stage.problem(f"{name}: {refusal}")
        return refusal

    def status(self, name: str) -> Record | None:
        """How far a guest is; None if it does not answer."""
        try:
            return self.cluster.ask_guest(name, {"verb": "status"}, timeout_seconds=_ANSWER_SECONDS)
        except Disconnected:
            return None

    def finish(self, name: str) -> Record:
        """Wait for the end of the work of a guest; its report."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < until:
            status = self.status(name)
            if status is not None and status["state"] != "running":
                if status["state"] == "failed":
                    self.stage.problem(f"{name}: {status['error']}")
                report: Record = status["report"]
                return report
            self.look()
            if name not in self.cluster.alive:
                return {}
            self.stage.interrupts.sleep(_POLL_SECONDS)
        self.stage.problem(f"{name}: its work does not end")
        return {}

    def play(self, name: str, **parameters: Any) -> Record:
        """The adversary or witness of a guest, from beginning to end; its report."""
        self.begin(name, **parameters)
        return self.finish(name)

    def execute(self, name: str, *argv: str) -> str:
        """What a command in a guest prints."""
        question = {"verb": "exec", "argv": list(argv)}
        answer = self.cluster.ask_guest(name, question, timeout_seconds=_PATIENCE_SECONDS)
        if answer.get("exit_code"):
            self.stage.problem(f"{name}: {' '.join(argv)}: exit code {answer['exit_code']}")
        output: bytes = answer.get("stdout", b"")
        return output.decode(errors="replace")

    def attack(self, name: str, *, by: Collection[str], **parameters: Any) -> Record:
        """The same, counted as what the attacker did; see `count_attack`."""
        report = self.play(name, **parameters)
        self.count_attack(name, report, by=by)
        return report

    def count_attack(self, name: str, report: Record, *, by: Collection[str]) -> None:
        """What an adversary says that it did.  Only what was refused for the reasons `by` was
        caught: an attack that failed for another one proves nothing of the defence."""
        reasons: dict[str, int] = report.get("reasons", {})
        self._tally.attempts += report.get("attempts", 0)
        self._tally.succeeded += report.get("succeeded", 0)
        self._tally.caught += sum(count for reason, count in reasons.items() if reason in by)
        for reason in reasons.keys() - set(by):
            self.stage.problem(f"{name} was refused for another reason: {reason}")
        told = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.items())
        attempts = report.get("attempts", 0)
        self.stage.say(
            f"{name}: {attempts:,} attempt{'s' * (attempts != 1)}, "
            f"{report.get('succeeded', 0):,} got through" + (f"; refused: {told}" if told else "")
        )

    def check(self, name: str, **parameters: Any) -> Record:
        """A victim fetches its pages and compares them."""
        report = self.play(name, task="check", **parameters)
        self.count_check(name, report)
        return report

    def count_check(self, name: str, report: Record) -> None:
        """What a witness found."""
        wrong = report.get("mismatches", 0) + report.get("lost", 0)
        self._tally.victim_checks += report.get("checked", 0)
        self._tally.victim_mismatches += wrong
        self.stage.say(
            f"{name}: compared {report.get('checked', 0):,} pages, "
            f"{report.get('mismatches', 0):,} wrong, {report.get('missing', 0):,} not there"
        )

    def count_files(self, name: str) -> Record:
        """What a victim found that has read files; its counters."""
        status = self.status(name)
        if status is None:
            self.stage.problem(f"{name} does not answer")
            return {}
        counters: Record = status["counters"]
        wrong = counters["mismatches"]
        self._tally.victim_checks += counters["files_verified"] + wrong
        self._tally.victim_mismatches += wrong
        self.stage.say(
            f"{name}: compared {counters['files_verified'] + wrong:,} files, {wrong:,} wrong"
        )
        return counters
