"""One image and what happens to it: turns of ours and of Linux, each of which is checked.

After each turn the volume must hold what it should: everything that was there before, but for what
the turn was to change or had not synced. Our nodes are processes (`tools.vm.node`): a crash of
theirs is a bad check, not a broken one.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Final

from fs.cluster import region
from ipc.errors import ExitCode, OperatorError
from tools.vm import tree, volume
from tools.vm.guests import NAMES, ClusterFailed, Guests
from tools.vm.judge import LAST_REMOVED, WORK_STEPS, Verdict, judge
from tools.vm.programs import need
from tools.vm.tree import Entry, Tree

IMAGE_BYTES: Final = 256 << 20
SLOTS: Final = 4
_COPIED_EVERY: Final = 16
_PATIENCE_SECONDS: Final = 900
_UNSYNCED_SECONDS_MAX: Final = 3.0
_ROOT: Final = Path(__file__).resolve().parents[2]
_FEATURES_OFF: Final = (
    *("inline-data", "indexed-dirs", "refcount", "discontig-bg", "xattr", "append-dio"),
    *("backup-super", "sparse", "unwritten"),
)
_MARKER: Final = "left-by-linux"


class Bad(Exception):
    """A check found something; the story ends here. The text has one line for each finding."""


class Story:
    """One image and what happened to it so far. Every method raises Bad when something is wrong."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.image = folder / "volume.img"
        self.tree: Tree = {}
        """What must be on the volume."""
        self._unknown: list[bytes] = []
        """Folders of which nothing is known until the next turn."""
        self._seed = seed
        self._random = Random(seed)
        self._say = say
        self._turn = 0
        folder.mkdir(parents=True)

    # Making a volume

    def make(self, cluster: str = "") -> None:
        """A volume of our own mkfs."""
        self._blank()
        self._run_node("mkfs", slots=str(SLOTS), cluster=cluster)
        self._check_image("our mkfs")

    def make_theirs(self) -> None:
        """A volume of mkfs.ocfs2 with the same features."""
        self._blank()
        command = [need("mkfs.ocfs2"), "-q", "-M", "cluster", "-N", str(SLOTS)]
        command += ["-b", "4K", "-C", "4K", "-J", "size=4M"]
        command += [f"--fs-features={','.join('no' + name for name in _FEATURES_OFF)}"]
        answer = subprocess.run(
            [*command, self.image.name],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode:
            raise OperatorError(f"mkfs.ocfs2: {answer.stderr.strip()}", ExitCode.INCONCLUSIVE)

    def _blank(self) -> None:
        with self.image.open("wb") as file:
            file.truncate(IMAGE_BYTES)

    # Turns of ours

    def ours(self, command: str, node: int, **options: str) -> None:
        """A node of ours does something and leaves."""
        self._turn += 1
        words = " ".join(f"{name} {value}" for name, value in options.items())
        self._say(f"our node {node}: {command} {words}".rstrip())
        found = _tree(self._run_node(command, node=str(node), **options))
        # What it changes is known from its own account only: Linux will judge that.
        if command == "change":
            self._unknown.append(os.fsencode(options["folder"]))
        elif command == "clear":
            self._unknown += [b"by-linux", b"for-linux"]
        self._compare(f"our node {node}", found, exact=command in ("read", "recover"))
        self.tree = found
        self._check_image(f"our node {node}")

    def ours_recovers(self, node: int, dead_node: int) -> None:
        """A node of ours takes over the slot of another one, after its mount."""
        slots = volume.read_slots(self.image, SLOTS)
        dead = [slot.number for slot in slots if slot.node == dead_node and slot.dirty]
        if not dead:
            raise Bad(f"node {dead_node} left no slot with a dirty journal")
        beat = region.decode(self._heartbeat_sector(dead_node))
        if beat is None or beat.node != dead_node or not beat.generation:
            raise Bad(f"node {dead_node} left a heartbeat that we do not understand: {beat}")
        self.ours("recover", node, slot=str(dead[0]))

    def ours_dies(self, node: int, folder: str) -> None:
        """A node of ours works and is killed; the tree is what it had synced.

        It leaves the heartbeat of a node of ours, which Linux must take for that of a dead one.
        """
        self._turn += 1
        self._say(f"our node {node} works and is killed")
        with (
            (self.folder / f"{self._turn}-die.errors").open("wb") as errors,
            subprocess.Popen(
                self._node_command("die", node=str(node), folder=folder),
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            ) as process,
        ):
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                # It goes on without a sync, and some of that reaches the disk.
                time.sleep(self._random.uniform(0, _UNSYNCED_SECONDS_MAX))
                ended = process.poll()
            finally:
                process.kill()
        if ended is not None or not line:
            raise Bad(self._errors("die", f"our node {node} ended by itself"))
        synced = _tree(line)
        self._compare(f"our node {node}", synced)
        self.tree = synced
        self._unknown = [os.fsencode(folder) + b"-unsynced"]
        slots = volume.read_slots(self.image, SLOTS)
        if not any(slot.node == node and slot.dirty for slot in slots):
            raise Bad(f"the killed node {node} left no slot with a dirty journal")
        beat = region.Beat(
            7, node, 1 + self._random.randrange(1 << 32), 62_000, 3, frozenset({node})
        )
        self.damage(self._heartbeat_offset(node), region.encode(beat))

    def guests_die(self) -> dict[bytes, str]:
        """A cluster of guests works, syncs, works on and is killed; sha256 of all synced files."""
        self._turn += 1
        self._say(f"{len(NAMES)} guests share a disk, work and are killed")
        try:
            with Guests(self.folder / "run") as guests:
                source = guests.run(NAMES[0], "find", "/", "-type", "f").split()
                for number, name in enumerate(NAMES):
                    guests.run(name, "mkdir", f"/of-{name}")
                    for path in source[number::_COPIED_EVERY]:
                        guests.run(name, "cp", path, f"/of-{name}/{path.replace('/', '_')}")
                    copies = f"/of-{NAMES[number - 1]}" if number else "/"
                    guests.run(name, "cp", source[number], f"{copies}/by-{name}")
                sums = guests.sums(NAMES[-1])
                for number, name in enumerate(NAMES):
                    # This takes no lock from another node, so the change stays in the journal.
                    old, new = f"of-{name}/{source[number].replace('/', '_')}", f"of-{name}/renamed"
                    guests.run(name, "mv", f"/{old}", f"/{new}")
                    sums[os.fsencode(new)] = sums.pop(os.fsencode(old))
                    guests.run(name, "sync")
                guests.run(NAMES[-1], "cp", source[0], f"/of-{NAMES[-1]}/unsynced")
                guests.cut_power()
                self.image.write_bytes(guests.image.read_bytes())
        except ClusterFailed as reason:
            raise Bad(f"our cluster: {reason}") from None
        slots = volume.read_slots(self.image, SLOTS)
        dirty = [slot.number for slot in slots if slot.dirty and slot.node is not None]
        if len(dirty) != len(NAMES):
            raise Bad(f"{len(NAMES)} killed guests left the journals of slots {dirty} dirty")
        return sums

    def guests_find_files(self, sums: Mapping[bytes, str]) -> None:
        """A cluster of guests comes to the volume, finds these files, works and leaves."""
        self._turn += 1
        self._say(f"{len(NAMES)} guests look for {len(sums)} files, work, leave")
        try:
            with Guests(self.folder / f"run-{self._turn}", self.image) as guests:
                for name in NAMES:
                    guests.run(name, "mkdir", f"/new-of-{name}")
                    guests.run(name, "cp", f"/{os.fsdecode(min(sums))}", f"/new-of-{name}/copy")
                for name in NAMES:
                    found = guests.sums(name)
                    lost = [path for path, content in sums.items() if found.get(path) != content]
                    if lost:
                        raise Bad(f"guest {name} misses {len(lost)} files, {lost[0]!r} first")
                guests.stop()
        except ClusterFailed as reason:
            raise Bad(f"our cluster: {reason}") from None
        self._check_image("our cluster")

    # Turns of Linux

    def files(self) -> dict[bytes, str]:
        """sha256 of all regular files that must be there, but for names that a line can't hold."""
        return {
            path: entry.content
            for path, entry in self.tree.items()
            if stat.S_ISREG(entry.mode) and path.isascii() and path.decode().isprintable()
        }

    def linux_finds_files(
        self, node: int, sums: Mapping[bytes, str], *, work: bool = True, replays: int = 0
    ) -> None:
        """Linux finds all that guests had synced, works and leaves."""
        self._turn += 1
        self._say(f"Linux as node {node} looks for {len(sums)} files{', works' * work}, leaves")
        marker = f"{_MARKER}-{node}-{self._turn}"
        verdict = judge(
            self.image,
            node=node,
            expect=sums,
            marker=marker,
            work=work,
            in_place=True,
            keep=self.folder / f"{self._turn}-linux",
        )
        if verdict.complaints:
            raise Bad("\n".join(f"Linux as node {node}: {line}" for line in verdict.complaints))
        self._check_replays(verdict, replays)
        self.tree = _after(verdict, marker, work=work, crash=False)

    def linux(self, node: int, *, work: bool = True, crash: bool = False, replays: int = 0) -> None:
        """Linux reads everything, works, and leaves or loses power.

        `replays` is in how many slots of others it must have found a journal to replay.
        """
        self._turn += 1
        ending = "loses power" if crash else "leaves"
        self._say(
            f"Linux as node {node} reads {len(self.tree)} entries{', works' * work}, {ending}"
        )
        marker = f"{_MARKER}-{node}-{self._turn}"
        verdict = judge(
            self.image,
            node=node,
            marker=marker,
            work=work,
            crash=crash,
            in_place=True,
            keep=self.folder / f"{self._turn}-linux",
        )
        if verdict.complaints:
            raise Bad("\n".join(f"Linux as node {node}: {line}" for line in verdict.complaints))
        self._compare(f"Linux as node {node}", verdict.before, exact=True)
        self._check_replays(verdict, replays)
        self.tree = _after(verdict, marker, work=work, crash=crash)

    def linux_is_cut(self, node: int) -> None:
        """Linux loses power in the middle of its work. What it had not begun to change is known."""
        self._turn += 1
        step = self._random.randrange(1, WORK_STEPS)
        self._say(f"Linux as node {node} works and loses power at step {step} of {WORK_STEPS}")
        verdict = judge(
            self.image,
            node=node,
            work=True,
            cut_at=step,
            in_place=True,
            keep=self.folder / f"{self._turn}-linux",
        )
        if verdict.complaints:
            raise Bad("\n".join(f"Linux as node {node}: {line}" for line in verdict.complaints))
        self._compare(f"Linux as node {node}", verdict.before, exact=True)
        self._unknown = [b"by-linux", b"for-linux"]

    def _check_replays(self, verdict: Verdict, replays: int) -> None:
        begun = sum("Begin replay journal" in note for note in verdict.notes)
        if begun < replays:
            raise Bad(f"Linux replayed {begun} journals where {replays} were dirty")

    # Damage

    def damage(self, offset: int, data: bytes) -> None:
        """Overwrite bytes of the image."""
        with self.image.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def linux_finds(self, what: str, evidence: str) -> None:
        """The judge must say no, and why."""
        self._turn += 1
        self._say(f"{what}: must be found")
        verdict = judge(self.image, marker=_MARKER, keep=self.folder / f"{self._turn}-linux")
        if not any(evidence in line for line in verdict.complaints):
            found = "\n".join(verdict.complaints) or "nothing"
            raise Bad(f"{what} was not found; found was:\n{found}")

    # Helpers

    def _run_node(self, command: str, **options: str) -> bytes:
        path = self.folder / f"{self._turn}-{command}.errors"
        with path.open("wb") as errors:
            try:
                answer = subprocess.run(
                    self._node_command(command, **options),
                    cwd=_ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    timeout=_PATIENCE_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise Bad(f"our node was not done with {command} in time") from None
        if answer.returncode:
            raise Bad(self._errors(command, f"our node failed at {command}"))
        return answer.stdout

    def _node_command(self, command: str, **options: str) -> list[str]:
        words = [sys.executable, "-m", "tools.vm.node", command, str(self.image.absolute())]
        options["seed"] = str(self._seed * 1000 + self._turn)
        return words + [word for name in options for word in (f"--{name}", options[name])]

    def _errors(self, command: str, what: str) -> str:
        lines = (self.folder / f"{self._turn}-{command}.errors").read_text(errors="replace")
        return "\n".join([what, *lines.strip().splitlines()[-12:]])

    def _compare(self, who: str, found: Tree, changed: bytes = b"", *, exact: bool = False) -> None:
        """All that must be there is, but for the folder `changed`; `exact`: and nothing else.

        Once after a node was killed that what it had not synced may be there, whole or in part.
        """
        free = [*self._unknown, *([changed] if changed else [])]
        self._unknown = []

        def judged(path: bytes) -> bool:
            return not any(path == folder or path.startswith(folder + b"/") for folder in free)

        wanted = {path: entry for path, entry in self.tree.items() if judged(path)}
        have = {
            path: entry
            for path, entry in found.items()
            if judged(path) and (exact or path in wanted)
        }
        differences = tree.compare(wanted, have)
        if differences:
            raise Bad("\n".join(f"{who}: {line}" for line in differences))

    def _heartbeat_offset(self, node: int) -> int:
        first = volume.read_volume(self.image).heartbeat_sector
        return (first + node) * region.SECTOR_BYTES

    def _heartbeat_sector(self, node: int) -> bytes:
        with self.image.open("rb") as file:
            file.seek(self._heartbeat_offset(node))
            return file.read(region.SECTOR_BYTES)

    def _check_image(self, who: str) -> None:
        complaints = [f"fsck.ocfs2: {line}" for line in volume.fsck(self.image)]
        complaints += [
            f"slot {slot.number} is left behind (node {slot.node})"
            for slot in volume.read_slots(self.image, SLOTS)
            if slot.dirty or slot.node is not None
        ]
        if complaints:
            raise Bad("\n".join(f"after {who}: {line}" for line in complaints[:20]))


def _tree(line: bytes) -> Tree:
    return tree.from_json(json.loads(line))


def _after(verdict: Verdict, marker: str, *, work: bool, crash: bool) -> Tree:
    """What must be there after Linux's turn: its last listing, and what it did after that."""
    found = dict(verdict.after)
    if work and crash:
        for name in LAST_REMOVED:
            del found[name]
            folder = name.rpartition(b"/")[0]
            found[folder] = replace(found[folder], mtime_s=-1)
    text = verdict.marker_text.encode()
    found[os.fsencode(marker)] = Entry(0o100644, 1, len(text), tree.digest(text))
    return found
