"""The commands that `exec` runs in a guest: built in, over its vfs, with Unix's names and messages.

Exit codes are Unix's too: 0 done, 1 something failed, 2 wrong use, 127 no such command.  Output is
bounded; what did not fit is cut, said so on stderr, and the exit code is then 1.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from guests.commands import COMMANDS, Console, UsageError
from guests.kernel import Kernel

STDOUT_BYTES_MAX: Final = 3 * 1024 * 1024
"""An answer must fit into one frame (`ipc.limits.CONTROL_MESSAGE_BYTES_MAX`, 4 MiB)."""
STDERR_BYTES_MAX: Final = 64 * 1024


class Result(NamedTuple):
    """How a command ended."""

    exit_code: int
    stdout: bytes
    stderr: bytes


class OutputFull(Exception):
    """A command wrote more than an answer can hold."""


class Shell:
    """Runs one command at a time."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def run(self, argv: list[str]) -> Result:
        """Run a command to its end."""
        name, *arguments = argv
        command = COMMANDS.get(name)
        if command is None:
            known = " ".join(sorted(COMMANDS))
            text = f"{name}: command not found; there are {known}\n"
            return Result(127, b"", text.encode())
        console = _BoundedConsole(self._kernel, name)
        try:
            command(console, arguments)
        except UsageError as error:
            console.say(f"{error}; usage: {command.__doc__}")
            console.exit_code = 2
        except OSError as error:
            console.fail(error)
        except OutputFull:
            console.say(f"output cut at {STDOUT_BYTES_MAX} bytes")
            console.exit_code = 1
        return Result(
            console.exit_code, bytes(console.stdout), bytes(console.stderr[:STDERR_BYTES_MAX])
        )


class _BoundedConsole(Console):
    def write(self, data: bytes) -> None:
        room = STDOUT_BYTES_MAX - len(self.stdout)
        self.stdout += data[:room]
        if len(data) > room:
            raise OutputFull
