"""A guest as a process: boot, jail, serve the control socket, work, stop.

Start with `run(spec)` in a process of its own.  It is ready when its control socket is there.

  exit  after
   0    the verb stop, SIGTERM, or the end of the supervisor; the image is clean
  65    configuration that makes no sense (too little memory)
  66    an image that can't be used
  69    the hypervisor refused it, or can't lend it its least memory; its socket can't be made
  71    a bug of ours
  72    the node was fenced: the cluster of its volume goes on without it

What went wrong at the start is one line in `log/NAME.log`, on stderr, and in the start-up report
`guest-NAME.error` in the run directory, which is there only after a failed start.

The supervisor's end is seen on a pidfd of it.  PR_SET_PDEATHSIG would tell of the end of the
forkserver's thread that forked us, which is another process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

from fs.errors import ImageError
from guests import adversary
from guests.control import Answers, Control, Credential, socket_path
from guests.jail import GuestJail
from guests.kernel import GuestSpec, Kernel
from guests.node import Fenced
from ipc import attach
from ipc.channel import Channel
from ipc.errors import ExitCode, OperatorError
from ipc.jail import descriptors
from ipc.limits import HANDSHAKE_SECONDS
from ipc.logfile import LogFile, log_to
from ipc.mqueue import QueueChannel

__all__ = ["GuestSpec", "run"]

log = logging.getLogger(__name__)

IDLE_SECONDS: Final = 0.5
COMMAND_SECONDS: Final = 0.02
"""Between two looks at a command that waits."""
"""How often an idle guest looks whether a lost hypervisor is back."""
REATTACH_PATIENCE_SECONDS: Final = 0.1
"""The first attachment waits longer (`ipc.limits.HANDSHAKE_SECONDS`); later ones hold up work."""


class FencedNode(Exception):
    """This guest is a node that is not in its cluster any more."""


def run(spec: GuestSpec) -> None:
    """Be this guest until told to stop.  Exits with an `ExitCode`."""
    if spec.jail.shut:
        descriptors.close_inherited()
    log_file = log_to(spec.run_directory / "log" / f"{spec.name}.log")
    report = spec.run_directory.absolute() / f"guest-{spec.name}.error"
    report.unlink(missing_ok=True)
    try:
        _serve(spec, log_file)
    except (ImageError, OperatorError) as error:
        log.error("event=not-started why=%s", error)
        with contextlib.suppress(PermissionError):
            report.write_text(f"{error}\n")
        sys.stderr.write(f"guest {spec.name}: {error}\n")
        code = error.exit_code if isinstance(error, OperatorError) else ExitCode.NO_INPUT
        sys.exit(code)
    except (FencedNode, Fenced) as error:
        log.error("event=ends why=%s", error)
        sys.exit(ExitCode.FENCED)
    except Exception:
        log.critical("event=bug", exc_info=True)
        sys.exit(ExitCode.GUEST_DIED)


def _serve(spec: GuestSpec, log_file: LogFile) -> None:
    jail = GuestJail(spec)
    jail.step_down()
    spec = jail.spec
    code = adversary.load(spec.adversary) if spec.adversary is not None else None
    credential = Credential(spec.token)
    kernel = Kernel(
        spec,
        clock_ns=time.time_ns,
        now_seconds=time.monotonic,
        connect=_connector(spec, credential) if spec.attach else None,
        detach=_detach,
    )
    try:
        if spec.adversary is not None and code is not None:
            kernel.workloads[adversary.WORKLOAD] = adversary.workload(
                spec.adversary, code, kernel, spec
            )
        answers = Answers(kernel, credential)
        control = Control(socket_path(spec.run_directory, spec.name), answers.answer)
        try:
            with _ends_watched(spec, control, answers):
                if spec.jail.shut:
                    # The console is of all processes of the cluster.
                    log_file.take_output()
                jail.shut()
                _loop(kernel, control, answers)
        finally:
            control.close()
    finally:
        kernel.stop()
    log.info("event=stop mismatches=%d", kernel.findings.mismatches)


def _loop(kernel: Kernel, control: Control, answers: Answers) -> None:
    log.info(
        "event=start pid=%d name=%s budget_pages=%d frames=%d clean=%s",
        os.getpid(),
        kernel.name,
        kernel.memory.budget.total,
        kernel.memory.budget.frames,
        kernel.fs.was_clean,
    )
    idle_seconds = IDLE_SECONDS
    if kernel.node is not None:
        node = kernel.node
        control.watch(node.mesh.fileno(), lambda _events: node.pump())
        idle_seconds = min(idle_seconds, node.spec.timing.heartbeat_interval_ns / 1e9 / 10)
    wait_seconds = idle_seconds
    while not answers.stopping:
        if kernel.is_fenced:
            raise FencedNode(
                f"{kernel.name} is fenced: {kernel.node and kernel.node.fenced_because}"
            )
        control.wait(0 if kernel.is_running else wait_seconds)
        wait_seconds = COMMAND_SECONDS if control.step() else idle_seconds
        if kernel.is_running:
            kernel.work()
        else:
            kernel.idle()


def _connector(spec: GuestSpec, credential: Credential) -> Callable[[], Channel]:
    """Attaches: patiently the first time, and then only if it is quick.

    A node has no time for patience: its lease runs meanwhile.
    """
    patience = [HANDSHAKE_SECONDS if spec.node is None else REATTACH_PATIENCE_SECONDS]

    def connect() -> Channel:
        seconds, patience[0] = patience[0], REATTACH_PATIENCE_SECONDS
        return attach.connect(
            spec.run_directory, spec.name, credential.token, patience_seconds=seconds
        )

    return connect


def _detach(channel: Channel) -> None:
    assert isinstance(channel, QueueChannel)
    attach.detach(channel)


@contextlib.contextmanager
def _ends_watched(spec: GuestSpec, control: Control, answers: Answers) -> Iterator[None]:
    """Stop at SIGTERM and when the supervisor is gone.

    SIGINT is not for us: Ctrl-C reaches the whole terminal's process group, and the supervisor
    stops its guests in order.
    """

    def stop(why: str) -> None:
        if not answers.stopping:
            log.info("event=stopping why=%s", why)
        answers.stopping = True

    # A handler alone does not end a poll (PEP 475), so a byte arrives with each signal.
    ears, mouth = socket.socketpair()
    pidfd = -1
    try:
        for end in (ears, mouth):
            end.setblocking(False)
        control.watch(ears.fileno(), lambda _events: stop("SIGTERM"))
        signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda _number, _frame: None)
        if spec.supervisor_pid is not None:
            try:
                pidfd = os.pidfd_open(spec.supervisor_pid)
            except ProcessLookupError:
                stop("the supervisor is gone")
            else:
                control.watch(pidfd, lambda _events: stop("the supervisor is gone"))
        yield
    finally:
        signal.set_wakeup_fd(-1)
        ears.close()
        mouth.close()
        if pidfd >= 0:
            os.close(pidfd)
