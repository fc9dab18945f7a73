"""One target under atheris, in a process of its own: libFuzzer ends the process when it is done.

python -m tests.fuzz.explore TARGET LIBFUZZER-ARGUMENT...
"""

from __future__ import annotations

import logging
import sys

import atheris

with atheris.instrument_imports(include=["ipc", "hypervisor", "fs", "guests"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Hand over to libFuzzer."""
    # What a peer does wrong is told in logs; here that is all that ever happens.
    logging.disable()
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
