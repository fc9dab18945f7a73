"""What a filter of system calls answers: classic BPF, run as the kernel runs it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ipc.jail.seccomp import Instruction

_DATA = struct.Struct("<iIQ6Q")
"""struct seccomp_data: number, architecture, where the call is made, arguments."""


def answer(
    program: Sequence[Instruction], audit: int, number: int, arguments: Sequence[int] = ()
) -> int:
    """The value that the program returns for a call."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    signed = number - (1 << 32) if number >= 1 << 31 else number
    data = _DATA.pack(signed, audit, 0, *padded)
    accumulator = place = 0
    while True:
        code, if_true, if_false, value = program[place]
        place += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x54:
                accumulator &= value
            case 0x15:
                place += if_true if accumulator == value else if_false
            case 0x35:
                place += if_true if accumulator >= value else if_false
            case 0x06:
                return value
            case _:
                raise AssertionError(f"instruction {code:#x} is not used here")
