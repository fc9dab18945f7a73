"""Coverage-guided fuzzing with atheris.

    python -m tests.fuzz [TARGET] --seconds 60 [--corpus DIR]
    python -m tests.fuzz TARGET --replay FILE

Without a target (`targets`) all run, each for its part of the time.  The corpus is kept and taken
up again; an input that finds something is written beside it, and the last lines say how to replay
it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from ipc.errors import ExitCode
from tests.fuzz.targets import LENGTH_MAX, TARGETS

_RUNS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


def explore(target: str, seconds: int, corpus: Path) -> bool:
    """Fuzz one target; whether nothing was found."""
    inputs = corpus / target
    findings = corpus / "findings"
    inputs.mkdir(parents=True, exist_ok=True)
    findings.mkdir(exist_ok=True)
    known = set(findings.iterdir())
    arguments = [
        f"-max_total_time={seconds}",
        f"-max_len={LENGTH_MAX[target]}",
        f"-artifact_prefix={findings}/{target}-",
        "-print_final_stats=1",
        "-timeout=20",
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


def main() -> None:
    """Fuzz, or replay one input with its traceback."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path(".cache/fuzz"))
    parser.add_argument("--replay", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        if arguments.target is None:
            parser.error("--replay needs the target that FILE is for")
        TARGETS[arguments.target](arguments.replay.read_bytes())
        print("nothing found")
        return
    targets = [arguments.target] if arguments.target else sorted(TARGETS)
    seconds = max(1, arguments.seconds // len(targets))
    clean = [explore(target, seconds, arguments.corpus) for target in targets]
    if not all(clean):
        sys.exit(ExitCode.VIOLATED)


if __name__ == "__main__":
    main()
