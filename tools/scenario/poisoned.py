"""The poisoned cluster: the scenario to show people.

Four nodes mount one volume and share one pool of clean pages.  `alpha`, `bravo` and `carol` read
all files again and again and compare each with the hash of its source; `mallory`, a member with all
rights, puts wrong bytes for the same files.

    act 1   pages from tmem are believed
    act 2   (defence on) the file system verifies what it gets and reports what is wrong, and the
            audit log says who put it; in the end the administrator quarantines that guest

Only the act of the defence that was asked for is judged: act 1 is to be seen to go wrong.
"""

from __future__ import annotations

import time
from typing import Final

from guests.adversaries.raw import file_oid
from hypervisor.provenance import parse_oid
from ipc.codec import Record
from tools.audit import Event
from tools.scenario.model import Figure, Part, Scene
from tools.scenario.scenario import Scenario
from tools.scenario.stage import MIB, Stage, World
from tools.scenario.volume import make_volume

VICTIMS: Final = ("alpha", "bravo", "carol")
ATTACKER: Final = "mallory"
BELIEVED: Final = "pages are believed"
VERIFIED: Final = "pages are verified"
_QUIET_SECONDS: Final = 1.0
_ATTACK_SECONDS: Final = 4.0
_LOOK_SECONDS: Final = 0.25
_PASSES: Final = 10_000
"""More than they get through: the end of the act ends their work."""
_SAID: Final = 6
_ASKED_PAGES: Final = 12
"""Of each file."""


def run(stage: Stage) -> None:
    """Both acts, or the first one."""
    _Act(stage, BELIEVED, verify=False, judged=not stage.defence).play()
    if stage.defence:
        _Act(stage, VERIFIED, verify=True, judged=True).play()


class _Act:
    def __init__(self, stage: Stage, name: str, *, verify: bool, judged: bool) -> None:
        self._stage = stage
        self._name = name
        self._verify = verify
        self._judged = judged
        self._began_at = 0.0
        self._tell_at: dict[str, int] = {}
        """Pages that a victim has to have caught before that is told again."""
        self._paths: dict[str, list[str | int]] = {}
        self._mark = ""

    def play(self) -> None:
        """From the start of its cluster to the end."""
        stage = self._stage
        stage.say(f"act: {self._name}")
        volume = make_volume(stage, *VICTIMS, ATTACKER)
        cast = [volume.player(name, verify=self._verify) for name in VICTIMS]
        cast.append(volume.player(ATTACKER, "filepoison", verify=self._verify))
        with stage.cluster(*cast, grants=volume.grants(), arena_bytes=6 * MIB) as world:
            self._began_at = time.monotonic()
            for name in VICTIMS:
                world.begin(name, "read_all", **volume.reading(_PASSES))
            self._look_for(world, _QUIET_SECONDS)
            seconds = _ATTACK_SECONDS + _QUIET_SECONDS
            world.begin(ATTACKER, rounds=10_000, pause_seconds=0.05, seconds=seconds)
            stage.say("mallory begins to put wrong pages for all files")
            self._mark = "the attack begins"
            self._look_for(world, _ATTACK_SECONDS)
            self._ask_who(world)
            if self._verify:
                self._quarantine(world)
                world.judge_reports(ATTACKER)
                self._look_for(world, _QUIET_SECONDS)
            self._judge(self._look(world))
            self._tell_refusals(world)

    def _look_for(self, world: World, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._look(world)
            self._stage.interrupts.sleep(_LOOK_SECONDS)

    def _look(self, world: World) -> Scene:
        parts = []
        for name in (ATTACKER, *VICTIMS):
            status = world.status(name)
            if status is None:
                self._stage.problem(f"{name} does not answer")
                continue
            part = _part(name, status)
            parts.append(part)
            if name == ATTACKER:
                self._paths = (status["report"] or {}).get("paths", {})
            elif part.caught_pages >= self._tell_at.get(name, 1):
                self._tell_where(world, part)
        scene = Scene(
            self._name,
            time.monotonic() - self._began_at,
            tuple(parts),
            tuple(self._stage.events[-_SAID:]),
            self._mark,
        )
        self._mark = ""
        self._stage.show(scene)
        return scene

    def _tell_where(self, world: World, part: Part) -> None:
        """From the audit log of the hypervisor, which the victim has told of the page, and who
        knows who put it."""
        found = last_report(world.reports(), part.name)
        # Of a file that the attacker has come to since it was looked at, it is told next time.
        if found is not None and str(found[0]) in self._paths:
            ino, page, putter = found
            self._tell_at[part.name] = 2 * part.caught_pages
            self._stage.say(
                f"{part.name}: caught page {page} of {self._paths[str(ino)][0]}, put by {putter} "
                f"({part.caught_pages} pages so far)"
            )

    def _ask_who(self, world: World) -> None:
        """Whose pages lie in the pool for the poisoned files.  Where they are believed, victims
        that drop them put them back under their own names; where they are not, a page that was
        caught is gone."""
        putters: dict[str, int] = {}
        for ino, (_, generation) in self._paths.items():
            oid = file_oid(int(ino), int(generation)).hex()
            for index in range(_ASKED_PAGES):
                for page in world.ask("page", oid=oid, index=index)["pages"]:
                    putters[page["guest"]] = putters.get(page["guest"], 0) + 1
        told = ", ".join(f"{name} {count}" for name, count in sorted(putters.items()))
        self._stage.say(f"administrator: pages of the files in the pool, by who put them: {told}")

    def _quarantine(self, world: World) -> None:
        answer = world.ask("quarantine", guest=ATTACKER, also_deny=True)
        self._mark = "quarantine"
        self._stage.say(
            f"administrator: quarantine; {answer['pages']} pages of mallory's can't be had any "
            f"more, {len(answer['denied'])} grant taken back"
        )

    def _tell_refusals(self, world: World) -> None:
        status = world.status(ATTACKER)
        for reason, count in ((status or {}).get("report") or {}).get("reasons", {}).items():
            self._stage.say(f"mallory: {count:,} puts were refused since: {reason}")

    def _judge(self, scene: Scene) -> None:
        stage, tally = self._stage, self._stage.tally
        stage.say(
            f"{self._name}: {scene.poisoned:,} wrong pages put, {scene.served:,} files read wrong, "
            f"{scene.caught:,} pages caught"
        )
        tally.figures[self._name] = Figure(
            f"poisoned {scene.poisoned:,} pages, served {scene.served:,} files, caught "
            f"{scene.caught:,} pages",
            {
                "poisoned_pages": scene.poisoned,
                "served_files": scene.served,
                "caught_pages": scene.caught,
            },
        )
        if self._judged:
            tally.attempts += scene.poisoned
            tally.succeeded += scene.served
            tally.caught += scene.caught
            tally.victim_checks += sum(part.read_files for part in scene.parts)
            tally.victim_mismatches += scene.served


def _part(name: str, status: Record) -> Part:
    counters = status["counters"]
    if name == ATTACKER:
        return Part(name, "attacker", poisoned_pages=(status["report"] or {}).get("succeeded", 0))
    wrong = counters["mismatches"]
    return Part(
        name,
        "victim",
        read_files=counters["files_verified"] + wrong,
        wrong_files=wrong,
        tmem_pages=counters["cleancache"]["succ_gets"],
        caught_pages=(counters.get("verification") or {}).get("mismatches", 0),
    )


def last_report(events: list[Event], guest: str) -> tuple[int, int, str] | None:
    """Inode, page and putter of the last page that a guest reported while it was there."""
    for event in reversed(events):
        if event["guest"] == guest and "put_by" in event:
            inode = parse_oid(event["object"])[:8]
            return int.from_bytes(inode, "little"), int(event["index"]), event["put_by"]
    return None


SCENARIO: Final = Scenario(
    "poisoned-cluster",
    "poisoning",
    "filepoison",
    "a member of a cluster with all rights puts wrong pages for the files that all are reading",
    "content verification; then provenance tells who it was, and quarantine puts it out",
    "pages from tmem are believed",
    "Four nodes mount one volume and share one pool of clean pages. The talk said that guests are "
    "assumed to be fairly trustworthy; here one of them is not. The first act shows what that "
    "means. In the second the file system compares what it gets with the checksum of what the disk "
    "holds: a wrong page is a miss, and the disk is read.",
    run,
    watched=True,
)
