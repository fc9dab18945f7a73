"""The commands that `exec` runs in a guest: built in, over its vfs, with Unix's names and messages.

Exit codes are Unix's too: 0 done, 1 something failed, 2 wrong use, 127 no such command.  Output is
bounded; what did not fit is cut, said so on stderr, and the exit code is then 1.

Most commands run to their end at once.  Some wait (`guests.lockcommands`) or go on for long
(`guests.workcommands`), so a command that was started is stepped until it has a result, and others
may be started meanwhile.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Final, NamedTuple

from guests.commands import COMMANDS, Console, UsageError
from guests.kernel import Kernel
from guests.lockcommands import LOCK_COMMANDS, WaitingCommand
from guests.workcommands import programs

STDOUT_BYTES_MAX: Final = 3 * 1024 * 1024
"""An answer must fit into one frame (`ipc.limits.CONTROL_MESSAGE_BYTES_MAX`, 4 MiB)."""
STDERR_BYTES_MAX: Final = 64 * 1024
WAITING_COMMANDS: Final[dict[str, WaitingCommand]] = {**LOCK_COMMANDS, "programs": programs}
_KNOWN: Final = " ".join(sorted({*COMMANDS, *WAITING_COMMANDS}))


class Result(NamedTuple):
    """How a command ended."""

    exit_code: int
    stdout: bytes
    stderr: bytes


class OutputFull(Exception):
    """A command wrote more than an answer can hold."""


class Execution:
    """A command that was started."""

    def __init__(self, kernel: Kernel, argv: list[str]) -> None:
        self._console = _BoundedConsole(kernel, argv[0])
        self._steps = self._console.run(argv)

    def step(self) -> Result | None:
        """Go on as far as it goes without waiting; the result at the end."""
        console = self._console
        try:
            next(self._steps)
        except StopIteration:
            pass
        except OutputFull:
            console.say(f"output cut at {STDOUT_BYTES_MAX} bytes")
            console.exit_code = 1
        else:
            return None
        stdout, stderr = bytes(console.stdout), bytes(console.stderr[:STDERR_BYTES_MAX])
        return Result(console.exit_code, stdout, stderr)

    def cancel(self) -> None:
        """Nobody waits for it any more: let go of what it holds.  OSError from the disk."""
        self._steps.close()


class _BoundedConsole(Console):
    def write(self, data: bytes) -> None:
        room = STDOUT_BYTES_MAX - len(self.stdout)
        self.stdout += data[:room]
        if len(data) > room:
            raise OutputFull

    def run(self, argv: list[str]) -> Generator[None, None, None]:
        outer, self.command = self.command, argv[0]
        try:
            yield from self._run(*argv)
        finally:
            self.command = outer

    def _run(self, name: str, *arguments: str) -> Iterator[None]:
        usage: str | None = None
        try:
            if name in WAITING_COMMANDS:
                usage = WAITING_COMMANDS[name].__doc__
                yield from WAITING_COMMANDS[name](self, list(arguments))
            elif name in COMMANDS:
                usage = COMMANDS[name].__doc__
                COMMANDS[name](self, list(arguments))
            else:
                self.say(f"command not found; there are {_KNOWN}")
                self.exit_code = 127
        except UsageError as error:
            self.say(f"{error}; usage: {usage}")
            self.exit_code = 2
        except OSError as error:
            self.fail(error)
