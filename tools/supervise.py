"""The supervisor of `tmem up -d`: a process of its own that keeps a cluster until told to stop.

    python -m tools.supervise DIRECTORY < cluster.json

It reads the checked configuration from standard input, brings the cluster up and says so with one
line on standard output: `up`, or the exit code and the reason.  SIGTERM (`tmem down`) ends it, and
so does the end of its run directory: no command could find the cluster any more.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ipc.errors import ExitCode, OperatorError
from tools.cluster import Cluster
from tools.config import ClusterConfig
from tools.demo import copy_disks, plan_cluster, prepare_disks, remove_disks
from tools.interrupts import Interrupts
from tools.rundir import ClusterDirectory

_LOOK_SECONDS = 0.2


def main() -> int:
    """Supervise until SIGTERM or SIGINT."""
    directory = ClusterDirectory(Path(sys.argv[1]))
    cache = Path(sys.argv[2])
    config = ClusterConfig.model_validate_json(sys.stdin.read())
    with Interrupts() as interrupts:
        try:
            _supervise(config, directory, cache, interrupts)
        except OperatorError as error:
            _say(f"{int(error.exit_code)} {error}")
            return error.exit_code
        except KeyboardInterrupt:
            return ExitCode.OK
    return ExitCode.OK


def _supervise(
    config: ClusterConfig, directory: ClusterDirectory, cache: Path, interrupts: Interrupts
) -> None:
    disks = prepare_disks(config, cache)
    try:
        copy_disks(disks, directory)
        with Cluster(
            plan_cluster(config, disks, directory, "on"), directory, interrupts
        ) as cluster:
            _say("up")
            while directory.path.is_dir():
                interrupts.sleep(_LOOK_SECONDS)
                cluster.watch()
    finally:
        remove_disks(directory)


def _say(line: str) -> None:
    """Tell whoever started us, once; then let go of the pipe."""
    print(line, flush=True)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
