"""What a process has open because whoever started it had: no rule and no filter takes that away.

A child of a fork server begins with ends of the server's own pipes, which all its children share:
one byte into one of them ends the server, and its owner then takes all children for dead; lines in
the other make a helper outside of every jail remove names of shared memory, or write complaints
without end.  It also has the starter's standard input, which may be a terminal that somebody types
at, and open for writing.
"""

from __future__ import annotations

import contextlib
import os


def close_inherited() -> None:
    """Close all but standard input, output and error, and have no input.  For the very beginning:
    whatever this process has opened itself goes as well."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            # The folder that was listed is one of them.
            with contextlib.suppress(OSError):
                os.close(int(name))
    let_go_of_input()


def let_go_of_input() -> None:
    """Standard input is empty from now on."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
