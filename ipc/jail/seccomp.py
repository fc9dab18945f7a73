"""Which system calls a process may make: a classic BPF program from a list of those allowed.

Everything else is answered with EPERM, not with death: the interpreter and the C library try calls
that they can do without, and a guest that was killed for one would take its unwritten pages along;
what was refused harms nobody.  Death is for calls that no honest program of ours can make: under
another architecture's numbers (a 64-bit x86 process can make 32-bit calls, whose numbers mean
something else) and x32's.

`clone3` is answered with ENOSYS where threads are allowed: its flags are in memory, which a filter
can't read, and the C library then uses `clone`, whose flags are in a register.

Filters add up and are never taken off.  The kernel remembers which numbers it always allows, so
calls without conditions cost next to nothing (Linux 5.11; before, some 2 ns an entry passed over).
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from ipc.jail.syscalls import X32_BIT, X86_64, Architecture, architecture, call, number

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K

ALLOW: Final = 0x7FFF_0000
KILL: Final = 0x8000_0000
"""The process, not only the thread."""
REFUSE: Final = 0x0005_0000
"""With an errno in the low half."""

_NUMBER_AT: Final = 0
_ARCHITECTURE_AT: Final = 4
_ARGUMENTS_AT: Final = 16
_SET_MODE_FILTER: Final = 1
_FLAG_ALL_THREADS: Final = 1


class Instruction(NamedTuple):
    """struct sock_filter."""

    code: int
    if_true: int
    if_false: int
    value: int


class Argument(NamedTuple):
    """A condition on the low 32 bits of an argument, from 0: `argument & mask == value`."""

    position: int
    mask: int
    value: int


class Call(NamedTuple):
    """A call that is allowed, why, and under which conditions (all of them)."""

    name: str
    reason: str
    arguments: tuple[Argument, ...] = ()
    refusal: int = 0
    """An errno instead: the call is not allowed, but the C library wants to hear another one."""


def one_of(name: str, reason: str, position: int, values: Iterable[int]) -> tuple[Call, ...]:
    """A call that is allowed with these values of one argument."""
    return tuple(Call(name, reason, (Argument(position, 0xFFFF_FFFF, value),)) for value in values)


def program(calls: Iterable[Call], machine: Architecture) -> list[Instruction]:
    """The filter.  A name that is there twice is allowed under either condition."""
    code = [
        Instruction(_LOAD, 0, 0, _ARCHITECTURE_AT),
        Instruction(_EQUAL, 1, 0, machine.audit),
        Instruction(_RETURN, 0, 0, KILL),
        Instruction(_LOAD, 0, 0, _NUMBER_AT),
    ]
    if machine is X86_64:
        code += [Instruction(_AT_LEAST, 0, 1, X32_BIT), Instruction(_RETURN, 0, 0, KILL)]
    for one in calls:
        found = number(one.name, machine)
        if found is None:
            continue
        body = _body(one)
        code += [Instruction(_EQUAL, 0, len(body), found), *body]
    return [*code, Instruction(_RETURN, 0, 0, REFUSE | errno.EPERM)]


def _body(one: Call) -> list[Instruction]:
    verdict = REFUSE | one.refusal if one.refusal else ALLOW
    if not one.arguments:
        return [Instruction(_RETURN, 0, 0, verdict)]
    body: list[Instruction] = []
    # Of each condition three instructions; the last one jumps over what is left of the body.
    length = 3 * len(one.arguments) + 2
    for done, (position, mask, value) in enumerate(one.arguments):
        left = length - 3 * (done + 1) - 1
        body += [
            Instruction(_LOAD, 0, 0, _ARGUMENTS_AT + 8 * position),
            Instruction(_AND, 0, 0, mask & 0xFFFF_FFFF),
            Instruction(_EQUAL, 0, left, value),
        ]
    # The number again, for whatever is compared next.
    return [*body, Instruction(_RETURN, 0, 0, verdict), Instruction(_LOAD, 0, 0, _NUMBER_AT)]


class _Filter(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter)))


def missing() -> str | None:
    """Why this machine can't filter calls; None if it can."""
    machine = architecture()
    if machine is None:
        return "a filter of system calls (their numbers are known for x86-64 and aarch64 only)"
    try:
        # Without a program to read the answer is EFAULT where filters are known.
        call("seccomp", _SET_MODE_FILTER, 0, None)
    except OSError as reason:
        if reason.errno != errno.EFAULT:
            return "a filter of system calls (the kernel was built without seccomp filters)"
    return None


def enter(calls: Sequence[Call], *, all_threads: bool = False) -> str | None:
    """From now on only these.  What is missing; no-new-privileges must be set (`limits`)."""
    lacking = missing()
    machine = architecture()
    if lacking is not None or machine is None:
        return lacking
    code = program(calls, machine)
    filters = (_Filter * len(code))(*(_Filter(*one) for one in code))
    shape = _Program(len(code), filters)
    flags = _FLAG_ALL_THREADS if all_threads else 0
    if call("seccomp", _SET_MODE_FILTER, flags, ctypes.pointer(shape)):
        return "a filter of system calls (a thread has another one already)"
    return None
