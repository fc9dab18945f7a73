"""A guest in a real process, and its control socket."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import multiprocess

from guests.boot import GuestSpec, run
from guests.control import socket_path
from ipc.codec import receive_record, send_record

START_SECONDS = 20.0


class GuestProcess:
    """Started by multiprocess' forkserver, as the supervisor does it."""

    def __init__(self, spec: GuestSpec) -> None:
        self.spec = spec
        self.path = socket_path(spec.run_directory, spec.name)
        context = multiprocess.get_context("forkserver")
        self.process = context.Process(target=run, args=(spec,), name=spec.name)

    def start(self) -> None:
        """Start, and wait until it is ready or has ended."""
        self.process.start()
        deadline = time.monotonic() + START_SECONDS
        while not self.path.exists() and self.process.is_alive():
            assert time.monotonic() < deadline, "the guest does not start"
            time.sleep(0.005)

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def ask(self, verb: str, **fields: object) -> dict[str, Any]:
        """A verb on the control socket."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(self.path))
            send_record(connection, {"verb": verb, **fields})
            answer = receive_record(connection)
        assert answer is not None
        return answer

    def exec(self, *argv: str) -> bytes:
        """Standard output of a command that succeeds."""
        answer = self.ask("exec", argv=list(argv))
        assert answer["exit_code"] == 0, answer
        return bytes(answer["stdout"])

    def work(self, workload: str, seed: int = 1, **parameters: object) -> None:
        """Begin a workload."""
        answer = self.ask("run", workload=workload, seed=seed, parameters=parameters)
        assert answer == {"accepted": True}

    def finish(self) -> dict[str, Any]:
        """Wait for the end of a workload; the status."""
        deadline = time.monotonic() + 60
        while (status := self.ask("status"))["state"] == "running":
            assert time.monotonic() < deadline, status
            time.sleep(0.02)
        return status

    def stop(self) -> int:
        """The verb stop; the exit code."""
        assert self.ask("stop") == {"stopping": True}
        return self.join()

    def join(self) -> int:
        """Wait for its end; the exit code."""
        self.process.join(20)
        code = self.process.exitcode
        assert code is not None, "the guest does not end"
        return int(code)

    def log(self) -> str:
        return (self.spec.run_directory / "log" / f"{self.spec.name}.log").read_text()


@contextmanager
def running_guest(spec: GuestSpec) -> Iterator[GuestProcess]:
    """Leave nothing behind, whatever happened."""
    guest = GuestProcess(spec)
    guest.start()
    try:
        yield guest
    finally:
        if guest.process.is_alive():
            guest.process.kill()
        guest.process.join()
        guest.process.close()
        socket_path(spec.run_directory, spec.name).unlink(missing_ok=True)


def read_io(pid: int) -> dict[str, int]:
    """/proc/PID/io of another process."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
