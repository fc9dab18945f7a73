"""One target under atheris, in a process of its own: libFuzzer ends the process when it is done.

python -m tests.fuzz.explore TARGET LIBFUZZER-ARGUMENT...
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["ipc", "hypervisor"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Hand over to libFuzzer."""
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
