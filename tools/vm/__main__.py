"""Let Linux judge: the whole campaign, or one image.

    python -m tools.vm [--only CHECK]... [--seed N] [--keep]
    python -m tools.vm IMAGE [--node N] [--expect PATH:SHA256|PATH:absent]... [--marker NAME]
                             [--work] [--crash] [--in-place]

Exit codes: 0 good, 1 not good, 2 could not run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType

from ipc.errors import ExitCode, OperatorError
from tools.vm.campaign import CHECKS
from tools.vm.judge import judge
from tools.vm.kernel import CACHE, get_kernel
from tools.vm.programs import need_all
from tools.vm.story import Bad, Story

_EXPECT = re.compile(r"(.+):([0-9a-f]{64}|absent)", re.DOTALL)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns an exit code. argparse's own, 2, is that of a check that can't run."""
    options = _parser().parse_args(arguments)
    try:
        if options.image is None:
            return run_campaign(options.only or list(CHECKS), options.seed, keep=options.keep)
        return _judge_image(options)
    except OperatorError as reason:
        print(f"vm-check could not run: {reason}", file=sys.stderr)
        return ExitCode.INCONCLUSIVE
    except KeyboardInterrupt:
        print("vm-check was interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Whatever ends us must end the machine too."""
    del number, frame
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.vm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", nargs="?", type=Path)
    parser.add_argument("--only", action="append", choices=list(CHECKS), metavar="CHECK")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 20))
    parser.add_argument("--keep", action="store_true", help="keep the images of good checks too")
    parser.add_argument("--node", type=int, default=0)
    parser.add_argument("--expect", action="append", type=_expectation, default=[])
    parser.add_argument("--marker", default="linux-was-here")
    parser.add_argument("--work", action="store_true")
    parser.add_argument("--crash", action="store_true")
    parser.add_argument("--in-place", action="store_true")
    return parser


def _expectation(text: str) -> tuple[bytes, str | None]:
    found = _EXPECT.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATH:SHA256 or PATH:absent")
    path = os.fsencode(found[1].lstrip("/"))
    return path, None if found[2] == "absent" else found[2]


def run_campaign(names: list[str], seed: int, *, keep: bool) -> int:
    """Run checks one after the other; one that could not run does not stop the others."""
    need_all()
    kernel = get_kernel()
    print(f"Linux {kernel.version}, seed {seed}", flush=True)
    code = ExitCode.OK
    runs = CACHE / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=runs))
        start = time.monotonic()

        def say(text: str, name: str = name, start: float = start) -> None:
            print(f"{name:10} {time.monotonic() - start:5.0f} s  {text}", flush=True)

        try:
            CHECKS[name](Story(folder / "story", seed, say))
        except Bad as reason:
            say(f"NOT GOOD; kept in {folder}")
            print("\n".join(f"    {line}" for line in str(reason).splitlines()), flush=True)
            code = ExitCode.VIOLATED
            continue
        except OperatorError as reason:
            say(f"COULD NOT RUN: {reason}; kept in {folder}")
            code = code or ExitCode.INCONCLUSIVE
            continue
        except Exception:  # noqa: BLE001 - our own bug is no verdict, and the other checks go on
            say(f"COULD NOT RUN; kept in {folder}")
            traceback.print_exc(file=sys.stdout)
            code = code or ExitCode.INCONCLUSIVE
            continue
        say("good")
        if not keep:
            shutil.rmtree(folder)
    print({0: "GOOD", 1: "NOT GOOD"}.get(code, "COULD NOT RUN ALL"), f"(seed {seed})")
    return code


def _judge_image(options: argparse.Namespace) -> int:
    verdict = judge(
        options.image,
        node=options.node,
        expect=dict(options.expect),
        marker=options.marker,
        work=options.work,
        crash=options.crash,
        in_place=options.in_place,
    )
    for note in verdict.notes:
        print(f"      {note}")
    print(f"      {len(verdict.before)} entries were read")
    for complaint in verdict.complaints:
        print(f"BAD   {complaint}")
    print("GOOD" if verdict.good else "NOT GOOD")
    return ExitCode.OK if verdict.good else ExitCode.VIOLATED


if __name__ == "__main__":
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, _interrupt)
    sys.exit(main())
