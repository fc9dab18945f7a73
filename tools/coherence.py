"""The coherence test: nodes share pages while things go wrong, and no read is old.

    tmem up --topo shared,n=3 --test coherence --nemesis kill,pause,partition

Every node runs the workload `histories`; the nemesis (`tools.nemesis`) kills, pauses and cuts off
nodes, spoils messages, kills the hypervisor and drops pages, by a plan from the seed.  Killed and
fenced nodes are started again under their old numbers.  In the end the volume is recovered and
checked, and all histories together are (`tools.histories`).

Verdict: 0 holds, 1 violated (an impossible read, a torn page, a damaged volume), 2 unknown (a node
did not come back, or the run says too little: no page that two nodes wrote was ever read).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from fs.block.file import FileDevice
from fs.errors import ImageError
from fs.mount import mount_image
from fs.ocfs2.fsck.checker import check as check_volume
from ipc.codec import Record
from ipc.errors import Disconnected, ExitCode, OperatorError
from tools.administer import ask_politely
from tools.cluster import HYPERVISOR, Cluster
from tools.config import ClusterConfig
from tools.demo import check_cluster, copy_disks, plan_cluster, prepare_disks, remove_disks
from tools.histories import Call, Violation, check, read_history
from tools.interrupts import Interrupts
from tools.nemesis import Action, plan
from tools.rundir import ClusterDirectory
from tools.sharing import only_volume

_LOOK_SECONDS: Final = 0.05
_FAULTS: Final = {"lose": 0.05, "duplicate": 0.1, "delay": 0.2, "reorder": 0.1}
_OPERATIONS: Final = 10_000_000
"""More than a run can do: the end of the time ends the work."""
_SETTLE_DEAD_TIMES: Final = 3
_MEND_SECONDS: Final = 10.0
_TELL_SECONDS: Final = 2.0
"""A guest that waits for a lock does not hear the nemesis; it is left alone then."""


def run_test(
    config: ClusterConfig,
    run: Path,
    cache: Path,
    kinds: tuple[str, ...],
    seconds: float,
    *,
    say: Callable[[str], None],
    interrupts: Interrupts,
) -> Record:
    """The whole test; the record that becomes results.json."""
    volume = only_volume(config, "coherence").model_copy(update={"nemesis": True})
    config = config.model_copy(update={"volume": [volume]})
    directory = ClusterDirectory(run / "coherence")
    check_cluster(config, directory)
    disks = prepare_disks(config, cache)
    actions = plan(kinds, volume, seconds, config.seed)
    cluster_plan = plan_cluster(config, disks, directory, "on")
    image = disks[volume.nodes[0]].path(directory)
    try:
        copy_disks(disks, directory)
        with Cluster(cluster_plan, directory, interrupts) as cluster:
            test = _Test(config, cluster, actions, say, interrupts)
            test.run(seconds)
        return test.result(image)
    finally:
        remove_disks(directory)


class _Test:
    """One run on a cluster that is up."""

    def __init__(
        self,
        config: ClusterConfig,
        cluster: Cluster,
        actions: list[Action],
        say: Callable[[str], None],
        interrupts: Interrupts,
    ) -> None:
        self._config = config
        self._volume = config.volume[0]
        self._cluster = cluster
        self._actions = actions
        self._say = say
        self._interrupts = interrupts
        self._records = cluster.directory.path / "histories"
        self._records.mkdir(exist_ok=True)
        for old in self._records.glob("*.jsonl"):
            old.unlink()
        self._lives: dict[str, int] = {}
        self._lost: set[str] = set()
        self._paused: set[str] = set()
        self._undo: list[tuple[float, Callable[[], None]]] = []
        self._problems: list[str] = []
        self._absent: dict[str, str] = {}
        self._mismatches: dict[str, int] = {}
        self._seed = config.seed

    # --- the run

    def run(self, seconds: float) -> None:
        """Prepare, let the nodes work while the nemesis acts, and bring everybody back."""
        first = self._volume.nodes[0]
        self._start(first, {"prepare": 1, "operations": 0})
        self._until_idle(first)
        for name in self._volume.nodes:
            self._start(name, {"operations": _OPERATIONS})
        began = time.monotonic()
        pending = list(self._actions)
        while (at := time.monotonic() - began) < seconds:
            if pending and pending[0].at_seconds <= at:
                self._act(pending.pop(0))
            self._look(at)
        settle = self._volume.heartbeat_interval * self._volume.dead_threshold
        until = seconds + (settle * _SETTLE_DEAD_TIMES if self._actions else 0)
        while self._undo or time.monotonic() - began < until:
            self._look(time.monotonic() - began)
        for name in self._cluster.alive:
            self._poll(name)

    def _look(self, at: float) -> None:
        """Undo what is over, start again who died, remember what the nodes say."""
        for due in [one for one in self._undo if one[0] <= at]:
            self._undo.remove(due)
            due[1]()
        self._interrupts.sleep(_LOOK_SECONDS)
        for line in self._cluster.watch():
            self._say(f"{at:.1f} s {line}")
        for name in list(self._cluster.deaths):
            self._revive(name)

    def _revive(self, name: str) -> None:
        self._lost.add(self._life(name))
        self._paused.discard(name)
        try:
            self._cluster.revive(name)
        except OperatorError as error:
            # Cut off from another node, for example. Its end is seen, and it is tried again.
            self._cluster.deaths.pop(name, None)
            self._absent[name] = f"{name} did not come back: {error}"
            self._say(self._absent[name])
            return
        self._absent.pop(name, None)
        self._say(f"{name} is back")
        self._start(name, {"operations": _OPERATIONS})

    def _life(self, name: str) -> str:
        return f"{name}#{self._lives.get(name, 0)}"

    def _start(self, name: str, parameters: dict[str, Any]) -> None:
        self._lives[name] = self._lives.get(name, 0) + 1
        self._seed += 1
        record = self._records / f"{self._life(name)}.jsonl"
        question = {
            "verb": "run",
            "workload": "histories",
            "seed": self._seed,
            "parameters": {"record": os.fspath(record), **parameters},
        }
        try:
            answer = self._cluster.ask_guest(name, question)
        except Disconnected as error:
            self._problems.append(f"{name}: {error}")
            return
        if not answer.get("accepted"):
            self._problems.append(f"{name}: {answer.get('error')}")

    def _until_idle(self, name: str) -> None:
        while self._poll(name):
            self._interrupts.sleep(_LOOK_SECONDS)
            self._cluster.watch()

    def _poll(self, name: str) -> bool:
        try:
            status = self._cluster.ask_guest(name, {"verb": "status"})
        except Disconnected:
            return name in self._cluster.alive
        self._mismatches[self._life(name)] = status["counters"]["mismatches"]
        if status["state"] == "failed":
            self._problems.append(f"{name}: {status['error']}")
        return bool(status["state"] == "running")

    # --- the nemesis

    def _act(self, action: Action) -> None:
        self._say(str(action))
        over = action.at_seconds + action.duration_seconds
        names = [name for name in action.nodes if name in self._cluster.alive]
        if action.kind == "kill":
            for name in names:
                self._cluster.signal(name, signal.SIGKILL)
        elif action.kind == "pause":
            for name in names:
                self._cluster.signal(name, signal.SIGSTOP)
                self._paused.add(name)
                self._undo.append((over, partial(self._resume, name)))
        elif action.kind == "partition" and len(names) == len(action.nodes):
            self._cut(names, "cut")
            self._undo.append((over, partial(self._cut, names, "heal")))
        elif action.kind == "messages":
            self._spoil(_FAULTS)
            self._undo.append((over, partial(self._spoil, {})))
        elif action.kind == "hypervisor":
            self._cluster.signal(HYPERVISOR, signal.SIGKILL)
        elif action.kind == "drop":
            with contextlib.suppress(Disconnected, OperatorError):
                ask_politely(self._cluster.directory, {"verb": "flush"}, ExitCode.USAGE)

    def _resume(self, name: str) -> None:
        if name in self._cluster.alive and name in self._paused:
            self._paused.discard(name)
            self._cluster.signal(name, signal.SIGCONT)

    def _cut(self, names: list[str], what: str) -> None:
        for name, other in (names, names[::-1]):
            # A cut that is not made is no harm; one that is not mended is.
            seconds = _TELL_SECONDS if what == "cut" else _MEND_SECONDS
            self._tell(name, {"verb": "nemesis", what: [other]}, seconds)

    def _spoil(self, faults: dict[str, float]) -> None:
        for name in self._volume.nodes:
            if name not in self._paused:
                self._tell(name, {"verb": "nemesis", "faults": faults, "seed": self._seed})

    def _tell(self, name: str, question: Record, seconds: float = _TELL_SECONDS) -> None:
        if name in self._cluster.alive:
            with contextlib.suppress(Disconnected):
                answer = self._cluster.ask_guest(name, question, timeout_seconds=seconds)
                if "error" in answer:
                    self._problems.append(f"{name}: {answer['error']}")

    # --- the end

    def result(self, image: Path) -> Record:
        """What is known when everybody has stopped."""
        calls: list[Call] = []
        for path in sorted(self._records.glob("*.jsonl")):
            calls += read_history(path.stem, path)
        violations = check(calls, frozenset(self._lost))
        damage = _examine(image)
        self._problems += self._absent.values()
        mismatches = sum(self._mismatches.values())
        shared = _shared_reads(calls)
        return {
            "test": "coherence",
            "seed": self._config.seed,
            "name": self._config.name,
            "reads": sum(call.kind == "read" for call in calls),
            "writes": sum(call.kind == "write" for call in calls),
            "syncs": sum(call.kind == "sync" for call in calls),
            "reads_of_others_writes": shared,
            "nemesis": [str(action) for action in self._actions],
            "lost_nodes": sorted(self._lost),
            "violations": [_text(one) for one in violations],
            "mismatches": mismatches,
            "damage": damage,
            "problems": self._problems,
            "verdict": _verdict(violations, mismatches, damage, self._problems, shared),
        }


def _examine(image: Path) -> list[str]:
    """Recover the volume as a node that is alone does, and check it."""
    try:
        mount_image(image, clock_ns=time.time_ns).unmount()
    except (ImageError, OSError) as error:
        return [f"the volume can't be recovered: {error}"]
    device = FileDevice(image, read_only=True)
    try:
        return [str(problem) for problem in check_volume(device) if not problem.pending]
    finally:
        device.close()


def _shared_reads(calls: list[Call]) -> int:
    """Reads of a value that another node wrote."""
    writers = {(call.register, call.value): call.node for call in calls if call.kind == "write"}
    return sum(
        writers.get((call.register, call.value), call.node) != call.node
        for call in calls
        if call.kind == "read"
    )


def _text(violation: Violation) -> str:
    return f"{violation.register.path} page {violation.register.page}: {violation.text}"


def _verdict(
    violations: list[Violation],
    mismatches: int,
    damage: list[str],
    problems: list[str],
    shared: int,
) -> str:
    if violations or mismatches or damage:
        return "violated"
    return "unknown" if problems or not shared else "holds"


def exit_code(results: Record) -> ExitCode:
    """0 holds, 1 violated, 2 unknown."""
    codes = {"holds": ExitCode.OK, "violated": ExitCode.VIOLATED}
    return codes.get(results["verdict"], ExitCode.INCONCLUSIVE)


def summary(results: Record) -> list[str]:
    """What a person reads."""
    others = results["reads_of_others_writes"]
    counts = [f"{results[key]:,} {key}" for key in ("reads", "writes", "syncs")]
    lost = len(results["lost_nodes"])
    lines = [
        f"{', '.join(counts)}; {others:,} reads of what another node wrote",
        f"{len(results['nemesis'])} things went wrong, {lost} nodes were lost",
        f"volume: {'; '.join(results['damage']) or 'sound'}",
    ]
    lines += [f"violation: {line}" for line in results["violations"][:20]]
    if results["mismatches"]:
        lines.append(f"{results['mismatches']} torn pages")
    lines += [f"problem: {line}" for line in results["problems"][:20]]
    return [*lines, f"coherence {results['verdict']}"]
