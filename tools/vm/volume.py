"""What ocfs2-tools say about an image on this side: its superblock, its slots, its damage.

Independent of our file system on purpose. Commands get plain names in a folder of ours, because
`debugfs.ocfs2` takes no spaces in a path.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ipc.errors import ExitCode, OperatorError
from tools.vm.programs import need

_PATIENCE_SECONDS: Final = 120
_CLEAN_LINES: Final = (
    re.compile(r"fsck\.ocfs2 [\d.]+"),
    re.compile(r"Checking OCFS2 filesystem in .*:"),
    re.compile(r"  (Label|UUID|Block size|Cluster size|Number of (blocks|clusters|slots)): .*"),
    re.compile(r".* was run with -f, check forced\."),
    re.compile(r"Pass \d[a-c]?: .*"),
    re.compile(r"\*\* Skipping slot recovery because -n was given\. \*\*"),
    re.compile(r"All passes succeeded\."),
)
"""Every line that a run on a sound volume prints."""


class NotOcfs2(Exception):
    """The tools find no volume in the image that can be mounted."""


@dataclass(frozen=True)
class Volume:
    """What joining the volume's cluster takes."""

    uuid: str
    cluster: str
    slots: int
    heartbeat_sector: int


@dataclass(frozen=True)
class Slot:
    """A slot: the node that the slot map gives it to, and whether its journal wants a replay."""

    number: int
    node: int | None
    dirty: bool


def read_volume(image: Path) -> Volume:
    """The superblock; raises NotOcfs2."""
    return parse_volume(_debugfs(image, "stats"), _debugfs(image, "stat //heartbeat"))


def parse_volume(stats: str, heartbeat: str) -> Volume:
    """From what `debugfs.ocfs2` prints for `stats` and for the heartbeat file."""
    # The label is free text, which may look like any other line.
    lines = [line for line in stats.splitlines() if not line.startswith("\tLabel:")]

    def value(label: str, pattern: str) -> str:
        for line in lines:
            found = re.search(rf"\b{label}: *({pattern})(?:\s|$)", line)
            if found is not None:
                return found[1]
        raise NotOcfs2(f"no OCFS2 superblock: {(stats.strip() or 'no answer').splitlines()[0]}")

    uuid = value("UUID", "[0-9A-F]{32}")
    slots = int(value("Max Node Slots", r"\d{1,3}"))
    bits = int(value("Block Size Bits", "9|10|11|12"))
    start = parse_first_block(heartbeat)
    if start is None:
        raise NotOcfs2("no heartbeat area")
    named = re.search(r"\bCluster name: *([A-Za-z0-9_-]+)", stats)
    return Volume(uuid, named[1] if named else "tmem", slots, start << (bits - 9))


def first_block(image: Path, path: str) -> int:
    """The block where a file begins; a path that begins with `//` is of the system directory."""
    block = parse_first_block(_debugfs(image, f"stat {path}"))
    if block is None:
        raise NotOcfs2(f"{path} has no block")
    return block


def parse_first_block(text: str) -> int | None:
    """Of what `debugfs.ocfs2` prints for `stat`."""
    found = re.search(r"## Offset .*Block#.*\n\s*\d+\s+\d+\s+\d+\s+(\d+)", text)
    return int(found[1]) if found else None


def read_slots(image: Path, count: int) -> list[Slot]:
    """The state of all slots."""
    owners = parse_slot_map(_debugfs(image, "slotmap"))
    return [
        Slot(
            number,
            owners.get(number),
            "Dirty" in _journal_flags(_debugfs(image, f"stat //journal:{number:04d}")),
        )
        for number in range(count)
    ]


def parse_slot_map(text: str) -> dict[int, int]:
    """Node by slot, of what `debugfs.ocfs2` prints for `slotmap`."""
    return {
        int(slot): int(node)
        for slot, node in re.findall(r"^\s*(\d+)\s+(\d+)\s*$", text, re.MULTILINE)
    }


def _journal_flags(text: str) -> str:
    found = re.search(r"Journal Flags:(.*)", text)
    return found[1] if found else ""


def fsck(image: Path) -> list[str]:
    """What `fsck.ocfs2 -fn` holds against the image.

    It exits with 0 and says that all passes succeeded on damaged images too, so every line that
    it does not print for a sound one counts.
    """
    program = need("fsck.ocfs2")
    answer = _run([program, "-fn", image.name], image.parent)
    lines = fsck_complaints(answer.stdout + answer.stderr)
    if answer.returncode and not lines:
        lines = [f"fsck.ocfs2 ended with {answer.returncode}"]
    return lines


def fsck_complaints(text: str) -> list[str]:
    """The lines of damage in the output of `fsck.ocfs2 -fn`; none at all is a complaint too."""
    lines = [line for line in text.splitlines() if line.strip()]
    bad = [line for line in lines if not any(form.fullmatch(line) for form in _CLEAN_LINES)]
    if "All passes succeeded." not in lines and not bad:
        bad.append("fsck.ocfs2 did not finish its passes")
    return bad


def _debugfs(image: Path, command: str) -> str:
    program = need("debugfs.ocfs2")
    answer = _run([program, "-R", command, image.name], image.parent)
    return answer.stdout + answer.stderr


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise OperatorError(
            f"{command[0]} took longer than {_PATIENCE_SECONDS} s", ExitCode.INCONCLUSIVE
        ) from None
