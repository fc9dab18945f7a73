"""Coverage-guided fuzzing with atheris.

    python -m tests.fuzz [TARGET] --seconds 60 [--corpus DIR]
    python -m tests.fuzz TARGET --replay FILE|ID
    python -m tests.fuzz [TARGET] --keep

Without a target (`targets`) all run, each for its part of the time.  What is found on the way stays
in DIR and is taken up again, together with the inputs that the repository keeps (`corpus`), which
`--keep` chooses anew.  An input that finds something is written to DIR/findings, and the last lines
say how to replay it; ID is that of a kept input.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import subprocess
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from ipc.errors import ExitCode
from tests.fuzz import corpus
from tests.fuzz.targets import LENGTH_MAX, TARGETS

_SEEDS = 16
"""Inputs at random, long ones: whoever begins with short ones needs hours to come as far."""
_FUZZED = tuple(
    str(Path(__file__).parents[2] / folder)
    for folder in ("ipc", "hypervisor", "fs", "guests", "tools")
)
_RUNS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


def explore(target: str, seconds: int, directory: Path) -> bool:
    """Fuzz one target; whether nothing was found."""
    inputs = directory / target
    findings = directory / "findings"
    corpus.unpack(target, inputs)
    for seed in range(_SEEDS):
        length = LENGTH_MAX[target] // (1 + seed % 4)
        data = random.Random(seed).randbytes(length)
        (inputs / corpus.identity(data)).write_bytes(data)
    findings.mkdir(exist_ok=True)
    known = set(findings.iterdir())
    arguments = [
        f"-max_total_time={seconds}",
        f"-max_len={LENGTH_MAX[target]}",
        f"-artifact_prefix={findings}/{target}-",
        "-print_final_stats=1",
        # Work without end ends here, and so does memory.
        "-timeout=20",
        "-rss_limit_mb=1024",
        # Steps are what counts, and a slow target would wait for long inputs for ever.
        "-len_control=0",
        str(inputs),
    ]
    command = [sys.executable, "-m", "tests.fuzz.explore", target, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    output = finished.stdout + finished.stderr
    runs = _RUNS.search(output)
    found = sorted(set(findings.iterdir()) - known)
    if not found and runs and finished.returncode == 0:
        kept = len(list(inputs.iterdir()))
        print(f"{target}: {runs[1]} inputs in {seconds} s, {kept} in the corpus, nothing found")
        return True
    print("\n".join(output.splitlines()[-40:]))
    print(f"{target}: FOUND something (exit code {finished.returncode})")
    for path in found:
        print(f"  python -m tests.fuzz {target} --replay {path}")
    return False


def keep(target: str, directory: Path) -> None:
    """Keep in the repository as few inputs as reach all that was reached so far, short ones."""
    inputs = directory / target
    corpus.unpack(target, inputs)
    found = sorted((path.read_bytes() for path in inputs.iterdir()), key=len)
    reached: set[tuple[CodeType, int, int]] = set()
    needed = []
    for first in range(8):
        # What is made once, of whatever shape, is reached by no input.
        TARGETS[target](bytes([first]))
    for data in found:
        steps = _steps(target, data)
        if not steps <= reached:
            reached |= steps
            needed.append(data)
    kept = corpus.keep(target, needed)
    print(f"{target}: {kept} inputs are kept; {len(needed)} of {len(found)} reach what all do")


def _steps(target: str, data: bytes) -> set[tuple[CodeType, int, int]]:
    """From which line to which one an input goes, in the code that is fuzzed."""
    steps: set[tuple[CodeType, int, int]] = set()

    def enter(frame: FrameType, _event: str, _argument: object) -> Any:
        code, before = frame.f_code, 0
        if not code.co_filename.startswith(_FUZZED):
            return None

        def step(frame: FrameType, event: str, _argument: object) -> Any:
            nonlocal before
            if event == "line":
                steps.add((code, before, frame.f_lineno))
                before = frame.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        TARGETS[target](data)
    finally:
        sys.settrace(None)
    return steps


def read_input(target: str, what: str) -> bytes:
    """A file, or a kept input.  LookupError when there is neither."""
    path = Path(what)
    return path.read_bytes() if path.exists() else corpus.find(target, what)


def main() -> None:
    """Fuzz, or replay one input with its traceback."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path(".cache/fuzz"))
    parser.add_argument("--replay", metavar="FILE")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        if arguments.target is None:
            parser.error("--replay needs the target that FILE is for")
        try:
            data = read_input(arguments.target, arguments.replay)
        except LookupError as reason:
            parser.error(f"no file {arguments.replay}, and {reason}")
        TARGETS[arguments.target](data)
        print("nothing found")
        return
    targets = [arguments.target] if arguments.target else sorted(TARGETS)
    seconds = max(1, arguments.seconds // len(targets))
    if arguments.keep:
        logging.disable()
        for target in targets:
            keep(target, arguments.corpus)
        return
    clean = [explore(target, seconds, arguments.corpus) for target in targets]
    if not all(clean):
        sys.exit(ExitCode.VIOLATED)


if __name__ == "__main__":
    main()
