"""The four kinds of error, and nothing else that is called one.

* Refused      an ordinary "no".  On the hot path it is a status and a reason in the reply
               (`ipc.abi.Status`, `ipc.abi.Reason`), never an exception, so it has no class here.
* GuestFault   a guest broke the ABI.  The guest gets a fault reply, the event is counted and
               nobody else notices.  Xen's counterpart is killing the domain.
* OperatorError bad configuration, a bad command, or a machine that can't do what was asked.  It is
               shown as one line and ends the command with `exit_code`; never a traceback.
* InvariantError our own bug.  The process dumps what it knows and stops.  Xen's counterpart is
               BUG().

`Disconnected` is the fifth thing a caller meets: not an error of either side but the news that the
peer process is gone.  A guest must be able to go on without its hypervisor.
"""

from __future__ import annotations

from enum import IntEnum

from ipc.abi import Reason


class ExitCode(IntEnum):
    """Exit codes of every command; 64 to 69 follow BSD's sysexits."""

    OK = 0
    VIOLATED = 1  # a checked property does not hold (a page mismatch, a lost page)
    INCONCLUSIVE = 2
    USAGE = 64
    BAD_CONFIG = 65
    NO_INPUT = 66  # a file that was named is missing or unusable (a disk image)
    UNAVAILABLE = 69  # this machine can't do it (limits, memory, a missing program)
    HYPERVISOR_BUG = 70
    GUEST_DIED = 71
    FENCED = 72  # a node that the cluster of its volume goes on without
    INTERRUPTED = 130


class GuestFault(Exception):
    """A guest broke the ABI; `reason` says which rule, `detail` is for the audit line."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.name.lower()} {detail}".rstrip())
        self.reason = reason
        self.detail = detail


class OperatorError(Exception):
    """What is wrong and what to do about it, in one line for a person."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.BAD_CONFIG) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class InvariantError(Exception):
    """Our own state contradicts itself."""


class Disconnected(Exception):
    """The peer of a channel is gone; the outcome of the call in flight is unknown."""
