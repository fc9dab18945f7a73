"""The peers that are programs of their own: `pingpong.c`, compiled when the benchmark runs, and
`yields`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from ipc.errors import ExitCode, OperatorError
from tools.bench.timing import Case, Figures, Skipped

SOURCE = Path(__file__).with_name("pingpong.c")
MQ = "C ping-pong 64 bytes (mq)"
MEMCPY = "C memcpy cold 4 KiB"
YIELDS = "Python yield ping-pong"
PROGRAM = "pingpong"


def cases(directory: Path, working_set_pages: int) -> tuple[list[Case], list[Skipped]]:
    """Both C cases, or why there are none; the program is put into `directory`."""
    compiler = shutil.which("cc")
    if compiler is None:
        reason = "no C compiler: apt-get install gcc"
        return [], [Skipped(MQ, reason), Skipped(MEMCPY, reason)]
    program = directory / PROGRAM
    built = subprocess.run(
        [compiler, "-O2", "-o", str(program), str(SOURCE), "-lrt"],
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode:
        reason = f"cc failed: {built.stderr.strip().splitlines()[0]}"
        return [], [Skipped(MQ, reason), Skipped(MEMCPY, reason)]

    def run_ping_pong(seconds: float, core: int | None) -> dict[str, Figures]:
        return {MQ: ping_pong(program, _core(core), seconds)}

    def copy(seconds: float, core: int | None) -> dict[str, Figures]:
        pages = str(working_set_pages)
        command = [str(program), "memcpy", _core(core), str(seconds), pages]
        return {MEMCPY: _run(command, 1)}

    return [Case(MQ, run_ping_pong), Case(MEMCPY, copy)], []


def ping_pong(program: Path, cores: str, seconds: float) -> Figures:
    """Round trips; `cores` is one for both sides, two with a comma between them, or -1."""
    return _run([str(program), "mq", cores, str(seconds)], 0)


def yields(cores: str, seconds: float) -> Figures:
    """Round trips of two processes in Python that wait by yielding; `cores` as above, not -1."""
    return _run([sys.executable, "-m", "tools.bench.yields", cores, str(seconds)], 0)


def _core(core: int | None) -> str:
    return "-1" if core is None else str(core)


def _run(command: list[str], pages: int) -> Figures:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OperatorError(
            f"{' '.join(command)} failed: {done.stderr.strip()}", ExitCode.UNAVAILABLE
        )
    middle_ns, p99_ns, mean_ns, _count = (float(text) for text in done.stdout.split())
    return Figures(middle_ns / 1e3, p99_ns / 1e3, pages / mean_ns * 1e9 if pages else None)
