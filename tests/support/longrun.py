"""The oracle's steps, a great many of them.

    python -m tests.support.longrun --steps 1000000 [--seed 1]

Goes from world to world, each with its own seed, eviction policy, scheduling and number of deaths.
The invariants are walked after every CHECK_EVERY-th step, and in bursts after every single one.
When something is found, the world is run again with a walk after every step, and what is printed is
the step that broke it, those before it, and how to get there again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import NamedTuple

import hypervisor.objects
from hypervisor.balance import MODES
from hypervisor.eviction import POLICIES
from hypervisor.invariants import check
from ipc.errors import ExitCode
from tests.support.oracle import World

WORLD_STEPS = 20_000
CHECK_EVERY = 64
BURST_EVERY = 2_000
BURST_STEPS = 50
_DEATHS = (0.0, 0.05, 0.3)
_FEW_OBJECTS = (2, 8192)


class Failure(NamedTuple):
    """What went wrong, and after which steps."""

    step: int
    error: BaseException
    log: list[str]


def world_of(seed: int) -> World:
    """Consecutive seeds differ in everything."""
    return World(
        seed,
        POLICIES[seed % len(POLICIES)],
        MODES[seed // len(POLICIES) % len(MODES)],
        kills=_DEATHS[seed % len(_DEATHS)],
        lends=seed // 3 % 2 == 1,
    )


def run(seed: int, steps: int, *, every_step: bool = False) -> Failure | None:
    """One world."""
    # Some pools are kept as if they had many objects.
    hypervisor.objects.FEW_MAX = _FEW_OBJECTS[seed // 2 % 2]  # type: ignore[misc]
    step = 0
    world = world_of(seed)
    try:
        for step in range(steps):
            world.step()
            if every_step or step % CHECK_EVERY == 0 or step % BURST_EVERY < BURST_STEPS:
                check(world.machine)
        check(world.machine)
    except Exception as error:  # noqa: BLE001  (any exception is a finding)
        return Failure(step, error, world.log)
    finally:
        hypervisor.objects.FEW_MAX = _FEW_OBJECTS[-1]  # type: ignore[misc]
    return None


def main() -> None:
    """Run, print a line every ten seconds, stop at the first finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.longrun", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    arguments = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Samplers and ghosts know pages by Python's hash; a seed must mean one history.
        argv = [sys.executable, "-m", "tests.support.longrun", f"--steps={arguments.steps}"]
        os.execve(
            sys.executable,
            [*argv, f"--seed={arguments.seed}"],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    started = told = time.monotonic()
    done = 0
    seed = arguments.seed
    print(f"model: {arguments.steps} steps from seed {seed}", flush=True)
    while done < arguments.steps:
        steps = min(WORLD_STEPS, arguments.steps - done)
        failure = run(seed, steps)
        if failure is not None:
            explain(seed, failure)
            sys.exit(ExitCode.VIOLATED)
        done += steps
        seed += 1
        now = time.monotonic()
        if now - told >= 10 or done == arguments.steps:
            told = now
            print(f"  {done} steps, {done / (now - started):.0f} a second", flush=True)
    print(f"nothing found in {done} steps of {seed - arguments.seed} worlds")


def explain(seed: int, failure: Failure) -> None:
    """The first step after which the world was wrong."""
    again = run(seed, failure.step + 1, every_step=True)
    step, error, log = failure if again is None else again
    print(f"FOUND in the world of seed {seed} at step {step}:")
    print(f"  {type(error).__name__}: {error}")
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        print(f"    {code.co_filename}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    print("steps before it:")
    for line in log[-12:]:
        print(f"  {line}")
    print(f"again: make model SEED={seed} STEPS={step + 1}")


if __name__ == "__main__":
    main()
