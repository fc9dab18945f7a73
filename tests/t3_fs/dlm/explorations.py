"""Larger worlds, state by state, for as long as one likes.

python -m tests.t3_fs.dlm.explorations --states 200000
"""

from __future__ import annotations

import argparse

from fs.dlm.explore import explore
from fs.dlm.modes import Mode
from tests.t3_fs.dlm.models import LockWorld, PageWorld

PR, EX = Mode.PR, Mode.EX


def main() -> None:
    """Print the counts of each world; a broken promise ends it with the steps that lead there."""
    parser = argparse.ArgumentParser(description="Exhaustive exploration of the lock manager")
    parser.add_argument("--states", type=int, default=200_000, help="at most, of each world")
    states_max = parser.parse_args().states
    worlds: list[tuple[str, LockWorld]] = [
        ("2 nodes", LockWorld([[EX, PR, EX], [PR, EX, PR]])),
        ("2 nodes, 1 death", LockWorld([[EX, PR, EX], [PR, EX, PR]], deaths=1)),
        ("2 nodes, 1 death, 1 join", LockWorld([[EX], [PR]], deaths=1, joins=1)),
        ("3 nodes", LockWorld([[EX, PR], [PR, EX], [PR, EX]])),
        ("3 nodes, 1 death", LockWorld([[EX], [PR], [EX]], deaths=1)),
        ("3 nodes, 2 deaths", LockWorld([[EX], [PR], [EX]], deaths=2)),
        ("page, 2 nodes, 1 death", PageWorld([[EX, PR, EX], [PR, EX, PR]], deaths=1)),
        ("page, 3 nodes", PageWorld([[EX, PR], [PR, EX], [PR]])),
        ("page, 3 nodes, 1 death", PageWorld([[EX], [PR], [PR]], deaths=1)),
    ]
    for what, world in worlds:
        print(f"{what}: {explore(world, states_max=states_max)}", flush=True)


if __name__ == "__main__":
    main()
