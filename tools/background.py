"""Clusters in the background: start a supervisor that outlives the command, and stop one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from ipc.errors import ExitCode, OperatorError
from ipc.names import process_start
from tools.config import ClusterConfig
from tools.demo import check_cluster
from tools.rundir import ClusterDirectory, ClusterRecord

_STOP_SECONDS: Final = 40.0


def start(config: ClusterConfig, directory: ClusterDirectory, cache: Path) -> None:
    """Bring a cluster up and leave it running; raises OperatorError if it does not come up."""
    check_cluster(config, directory)
    directory.make()
    command = [sys.executable, "-m", "tools.supervise", str(directory.path), str(cache.absolute())]
    directory.log("console").touch(mode=0o600)
    with directory.log("console").open("ab") as console:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=console,
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            process.stdin.write(config.model_dump_json().encode())
            process.stdin.close()
            answer = process.stdout.read().decode()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if answer.strip() == "up":
        # It lives on without us; nobody waits for it here.
        process.returncode = 0
        return
    process.wait()
    directory.sweep()
    number, _, reason = answer.strip().partition(" ")
    if not reason:
        raise OperatorError(
            f"the supervisor ended (exit code {process.returncode}); see "
            f"{directory.log('console')}",
            ExitCode.HYPERVISOR_BUG,
        )
    raise OperatorError(reason, ExitCode(int(number)))


def stop(directory: ClusterDirectory, record: ClusterRecord) -> None:
    """End the supervisor and with it the cluster; kills what does not end in time."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(record.supervisor_pid)
        try:
            if record.lives:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        finally:
            os.close(pidfd)
    deadline = time.monotonic() + _STOP_SECONDS
    while process_start(record.supervisor_pid) == record.supervisor_start:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    directory.sweep()
