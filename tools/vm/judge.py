"""One volume, one machine, one verdict.

The image is copied first unless it is to be changed in place. What the image says about itself is
taken before Linux sees it: a dirty journal whose slot belongs to no node is bad at once, because
Linux would not replay it.

Linux lists all entries before and after its work. Then it writes the marker, and syncs it.

`crash` leaves the journal of Linux's slot dirty and the slot map entry in place: a dead node to
try a recovery on. Then the image is not checked, since its journal is not replayed. After `work`
two files are removed between the last listing and the marker (`LAST_REMOVED`), and another is
open that has lost its name: the dead node's truncate log and orphan directory hold something.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ipc.errors import ExitCode, OperatorError
from tools.vm import initramfs, report, tree, volume
from tools.vm.kernel import CACHE, get_kernel
from tools.vm.machine import GUEST_LIMIT_SECONDS, run_machine
from tools.vm.programs import need_all
from tools.vm.report import Report
from tools.vm.tree import Tree
from tools.vm.volume import NotOcfs2, Slot, Volume

NODES_MAX: Final = 255
PATIENCE_SECONDS: Final = 900
"""A machine takes 20 s of a CPU; its host may have other things to do."""
WORK_STEPS: Final = 58
"""How many work.sh tells where ours left it something to change."""
LAST_REMOVED: Final = (b"by-linux/large", b"by-linux/piece-1")
_MARKER: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class Verdict:
    """What is bad, what is worth knowing, and what Linux saw: before its work and after."""

    complaints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    before: Tree = field(default_factory=dict)
    after: Tree = field(default_factory=dict)
    marker_text: str = ""

    @property
    def good(self) -> bool:
        """Nothing is bad."""
        return not self.complaints


@dataclass(frozen=True)
class Task:
    """What Linux is to do. The fields are the arguments of `judge`."""

    node: int = 0
    marker: str | None = None
    work: bool = False
    crash: bool = False
    cut_at: int | None = None


def judge(
    image: Path,
    *,
    node: int = 0,
    expect: Mapping[bytes, str | None] | None = None,
    marker: str | None = None,
    work: bool = False,
    crash: bool = False,
    cut_at: int | None = None,
    in_place: bool = False,
    keep: Path | None = None,
) -> Verdict:
    """Let Linux, as cluster node `node`, mount the image and judge it.

    `expect` holds the sha256 of each file (or link target) by path, None for what must not be
    there; `marker` is a file that Linux writes and syncs in the root; with `work` it does all that
    work.sh knows; with `crash` it loses power at the end, with `cut_at` when its work has come to
    this of `WORK_STEPS`. `keep` gets the console and the report.

    Raises OperatorError when the check can't run.
    """
    task = Task(node, marker, work, crash, cut_at)
    _check(image, task)
    kernel = get_kernel()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="judge-", dir=CACHE) as name:
        folder = Path(name)
        disk = image if in_place else _copy(image, folder / "copy")
        verdict = Verdict()
        try:
            facts = volume.read_volume(_plain(disk, folder))
        except NotOcfs2 as reason:
            verdict.complaints.append(str(reason))
            return verdict
        slots = volume.read_slots(_plain(disk, folder), facts.slots)
        replays = _judge_slots(slots, node, verdict)
        if not verdict.good:
            return verdict
        owners = {slot.node for slot in slots if slot.node is not None}
        job = _job(task, facts, replays, sorted({node} | owners | set(range(facts.slots))))
        run = run_machine(
            kernel,
            initramfs.build(kernel, job),
            disk,
            folder,
            patience_seconds=PATIENCE_SECONDS,
            cut_at=None if cut_at is None else b"@ progress %d\n" % cut_at,
        )
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / "console").write_bytes(run.console)
            (keep / "report").write_bytes(run.report)
        told = report.parse(run.report)
        if not told.is_ok("ready"):
            raise OperatorError(
                f"the machine did not come up (last step: {told.last_step}); "
                f"its console ends: {_tail(run.console)}",
                ExitCode.INCONCLUSIVE,
            )
        if run.timed_out:
            raise OperatorError(
                f"the machine was not done after {PATIENCE_SECONDS} s "
                f"(last step: {told.last_step})",
                ExitCode.INCONCLUSIVE,
            )
        if cut_at is not None and not run.cut:
            raise OperatorError(
                f"the machine was off before its work came to step {cut_at} "
                f"(last step: {told.last_step})",
                ExitCode.INCONCLUSIVE,
            )
        verdict.marker_text = f"node {node}, Linux {kernel.version}\n"
        judge_report(told, run.console, task, replays, verdict)
        verdict.notes.insert(0, f"Linux {kernel.version}, {run.seconds:.0f} s")
        _judge_expectations(expect or {}, verdict)
        if not crash and cut_at is None:
            _judge_rest(_plain(disk, folder), facts, verdict)
    return verdict


def _check(image: Path, task: Task) -> None:
    if not 0 <= task.node < NODES_MAX:
        raise OperatorError(f"node {task.node} is not in 0..{NODES_MAX - 1}", ExitCode.INCONCLUSIVE)
    if task.marker is not None and not _MARKER.fullmatch(task.marker):
        raise OperatorError(
            f"the marker {task.marker!r} is no plain file name", ExitCode.INCONCLUSIVE
        )
    if not image.is_file():
        raise OperatorError(f"image {image}: no such file", ExitCode.INCONCLUSIVE)
    need_all()


def _copy(image: Path, place: Path) -> Path:
    """A copy in which holes stay holes."""
    command = ["cp", "--sparse=always", "--reflink=auto", "--", str(image), str(place)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise OperatorError(f"can't copy {image}: {answer.stderr.strip()}", ExitCode.INCONCLUSIVE)
    return place


def _plain(disk: Path, folder: Path) -> Path:
    """The disk under a name that the tools take."""
    link = folder / "disk"
    if not link.is_symlink():
        link.symlink_to(disk.absolute())
    return link


def _tail(console: bytes) -> str:
    lines = console.decode(errors="replace").split("\n")
    return " | ".join(line.strip() for line in lines[-4:] if line.strip()) or "nothing"


def _judge_slots(slots: list[Slot], node: int, verdict: Verdict) -> int:
    """How many slots of other nodes Linux must replay."""
    replays = 0
    for slot in slots:
        if not slot.dirty:
            continue
        if slot.node is None:
            verdict.complaints.append(
                f"slot {slot.number} has a dirty journal but belongs to no node: "
                "Linux does not replay it"
            )
            continue
        verdict.notes.append(f"slot {slot.number} has the dirty journal of node {slot.node}")
        replays += slot.node != node
    return replays


def _job(task: Task, facts: Volume, replays: int, nodes: list[int]) -> dict[str, str]:
    return {
        "NODES": " ".join(str(node) for node in nodes),
        "NODE": str(task.node),
        "CLUSTER": facts.cluster,
        "UUID": facts.uuid,
        "HEARTBEAT_SECTOR": str(facts.heartbeat_sector),
        "REPLAYS": str(replays),
        "MARKER": task.marker or "",
        "WORK": "yes" if task.work else "",
        "CRASH": "yes" if task.crash else "",
        "LIMIT_SECONDS": str(GUEST_LIMIT_SECONDS),
    }


def judge_report(told: Report, console: bytes, task: Task, replays: int, verdict: Verdict) -> None:
    """What the machine's own words hold against the image."""
    steps = ["heartbeat", "mount"]
    steps += ["replay"] if replays else []
    steps += ["list-before"]
    if task.cut_at is None:
        steps += ["work", "list-after"] if task.work else []
        steps += ["marker"] if task.marker else []
        steps += ["crash"] if task.crash else ["unmount"]
    # What comes after a step that failed was not reached: one line is enough.
    problems = [problem for step in steps if (problem := told.problem(step))]
    verdict.complaints += problems[:1]
    if "hung" in told.results:
        verdict.complaints.append(f"Linux hung: {told.results['hung']}")
    verdict.complaints += [
        f"kernel: {line}" for line in report.kernel_lines(console, report.KERNEL_TROUBLE)[:20]
    ]
    verdict.notes += report.kernel_lines(console, report.KERNEL_NEWS)[:20]
    verdict.before = tree.from_report(told, "before")
    verdict.after = tree.from_report(told, "after") if task.work else dict(verdict.before)
    for name, found in (("before", verdict.before), ("after", verdict.after)):
        verdict.complaints += tree.unreadable(found)
        said = told.data.get(f"{name}-complaints", b"").decode(errors="replace").strip()
        verdict.complaints += [f"listing: {line}" for line in said.splitlines()[:10]]
        if told.is_ok(f"list-{name}") and b"" not in found:
            verdict.complaints.append(f"the listing {name} the work is empty")


def _judge_expectations(expect: Mapping[bytes, str | None], verdict: Verdict) -> None:
    if not verdict.before:
        return
    for path, want in expect.items():
        entry = verdict.before.get(path)
        have = entry.content if entry else None
        if have != want:
            verdict.complaints.append(
                f"{path!r} has {have or 'no such entry'} where {want or 'no entry'} is expected"
            )


def _judge_rest(disk: Path, facts: Volume, verdict: Verdict) -> None:
    """What Linux left after it has unmounted."""
    if verdict.complaints:
        return  # a mount that went wrong leaves its slot taken, which would be told as damage
    for slot in volume.read_slots(disk, facts.slots):
        if slot.dirty or slot.node is not None:
            state = "dirty" if slot.dirty else "clean"
            verdict.complaints.append(
                f"slot {slot.number} is {state} and of node {slot.node} after the unmount"
            )
    verdict.complaints += [f"fsck.ocfs2: {line}" for line in volume.fsck(disk)[:20]]
