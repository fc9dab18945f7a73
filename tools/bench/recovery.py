"""How long a writer waits for a node that died: `python -m tools.bench.recovery [--timing fast]`.

Two guests write one page of one volume in turns.  One is killed while it has the lock, or stopped
for good (`--pause`).  Time runs from the signal to the end of the survivor's write that waits for
that lock: the node is found dead, a view without it, locks re-mastered, its journal replayed.

A killed process is known to be gone at the next heartbeat, since it lets its reservation go.  A
stopped one is like a host that crashed or is cut off: only its silence tells.  `--timing linux
--pause` is to be compared with a real cluster of two nodes, measured with the same timings: 25 s
from the crash to the survivor's next write.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from ipc.errors import ExitCode
from tools.cluster import Cluster
from tools.config import ClusterConfig, validate
from tools.demo import check_cluster, copy_disks, plan_cluster, prepare_disks
from tools.histories import read_history
from tools.interrupts import Interrupts
from tools.rundir import ClusterDirectory

TIMINGS: Final[dict[str, dict[str, float]]] = {
    "fast": {
        "heartbeat_interval": 0.2,
        "dead_threshold": 16,
        "idle_timeout": 2.0,
        "keepalive": 0.2,
        "reconnect": 0.1,
    },
    "linux": {
        "heartbeat_interval": 2.0,
        "dead_threshold": 7,
        "idle_timeout": 10.0,
        "keepalive": 2.0,
        "reconnect": 2.0,
    },
    "o2cb": {},
}
_VICTIM: Final = "red"
_WRITER: Final = "blue"
_WARM_UP_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.02
_DEAD_TIMES_MAX: Final = 5
_OPERATIONS: Final = 10_000_000
_PATIENCE_SECONDS: Final = 0.1
"""A writer that does not end a write for so long waits for a lock."""
_ENDING_NS: Final = 30_000_000
_ATTEMPTS_MAX: Final = 50


def measure(timing: str, *, pause: bool = False) -> float:
    """Seconds from the signal to the survivor's next write."""
    with tempfile.TemporaryDirectory(prefix="tm-") as scratch:
        folder = Path(scratch)
        tree = folder / "tree"
        tree.mkdir()
        (tree / "file").write_bytes(bytes(4096))
        config = _config(tree, timing)
        directory = ClusterDirectory(folder / "on")
        check_cluster(config, directory)
        disks = prepare_disks(config, folder / "cache")
        plan = plan_cluster(config, disks, directory, "on")
        copy_disks(disks, directory)
        with Interrupts() as interrupts, Cluster(plan, directory, interrupts) as cluster:
            dead_seconds = config.volume[0].timing().dead_ns / 1e9
            try:
                return _stall(cluster, folder, dead_seconds, interrupts, pause=pause)
            finally:
                if _VICTIM in cluster.alive:
                    cluster.signal(_VICTIM, signal.SIGKILL)


def _config(tree: Path, timing: str) -> ClusterConfig:
    names = [_VICTIM, _WRITER]
    fields: dict[str, Any] = {
        "name": f"recovery-{os.getpid()}",
        "hypervisor": {"arena": "2M"},
        "guest": [{"name": name, "memory": "1M"} for name in names],
        "volume": [{"name": "data", "nodes": names, "tree": str(tree), **TIMINGS[timing]}],
    }
    return validate(fields, "recovery")


def _stall(
    cluster: Cluster, folder: Path, dead_seconds: float, interrupts: Interrupts, *, pause: bool
) -> float:
    record = folder / f"{_WRITER}.jsonl"
    _write(cluster, _VICTIM, folder / "prepare.jsonl", prepare=1, operations=0)
    while cluster.ask_guest(_VICTIM, {"verb": "status"})["state"] == "running":
        interrupts.sleep(_LOOK_SECONDS)
    _write(cluster, _VICTIM, folder / f"{_VICTIM}.jsonl", operations=_OPERATIONS)
    _write(cluster, _WRITER, record, operations=_OPERATIONS)
    interrupts.sleep(_WARM_UP_SECONDS)
    begin_ns = _stop_victim(cluster, record, interrupts)
    if not pause:
        cluster.signal(_VICTIM, signal.SIGKILL)
    until = time.monotonic() + _DEAD_TIMES_MAX * dead_seconds
    while time.monotonic() < until:
        interrupts.sleep(_LOOK_SECONDS)
        ends_ns = [call.end_ns for call in read_history(_WRITER, record) if call.returned]
        if (waited_ns := max(ends_ns) - begin_ns) > _PATIENCE_SECONDS * 1e9:
            return waited_ns / 1e9
    raise TimeoutError(f"the survivor did not write within {_DEAD_TIMES_MAX} dead times")


def _stop_victim(cluster: Cluster, record: Path, interrupts: Interrupts) -> int:
    """Stop the victim at a moment when it has the lock, so that the writer waits; when it was."""
    for _ in range(_ATTEMPTS_MAX):
        begin_ns = time.monotonic_ns()
        cluster.signal(_VICTIM, signal.SIGSTOP)
        interrupts.sleep(_PATIENCE_SECONDS)
        calls = read_history(_WRITER, record)
        if max(call.end_ns for call in calls if call.returned) < begin_ns + _ENDING_NS:
            return begin_ns
        cluster.signal(_VICTIM, signal.SIGCONT)
        interrupts.sleep(_PATIENCE_SECONDS)
    raise TimeoutError("the victim never had the lock when it was stopped")


def _write(cluster: Cluster, name: str, record: Path, **parameters: int) -> None:
    everything = {"record": str(record), "files": 1, "pages": 1, "writes": 1.0, **parameters}
    question = {
        "verb": "run",
        "workload": "histories",
        "seed": len(str(record)),
        "parameters": everything,
    }
    answer = cluster.ask_guest(name, question)
    if not answer.get("accepted"):
        raise RuntimeError(f"{name}: {answer.get('error')}")


def main() -> int:
    """Print the seconds of each run, and their median."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.recovery", description=__doc__)
    parser.add_argument("--timing", choices=list(TIMINGS), default="fast")
    parser.add_argument("--pause", action="store_true", help="SIGSTOP for good, not SIGKILL")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    seconds = []
    for _ in range(arguments.runs):
        seconds.append(measure(arguments.timing, pause=arguments.pause))
        print(f"{arguments.timing}: the writer waited {seconds[-1]:.2f} s", flush=True)
    print(f"{arguments.timing}: median {statistics.median(seconds):.2f} s of {len(seconds)} runs")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
