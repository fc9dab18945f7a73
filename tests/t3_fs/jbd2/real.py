"""Real ext3 and ext4 images with their journals, and the programs that judge them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fs.block.device import BLOCK_BYTES
from fs.block.memory import MemoryDevice
from fs.jbd2.area import Area
from fs.jbd2.format import checksum
from tests.support.tools import need_tool
from tests.t3_fs.images import host_tree

IMAGE_BYTES = 24 << 20
JOURNAL = "<8>"
_RUN = re.compile(r"\((\d+)(?:-(\d+))?\):(\d+)(?:-(\d+))?")
_SUPER_OFFSET = _SUPER_BYTES = 1024
_INCOMPAT_OFFSET = 96
_NEEDS_RECOVERY = 4


@dataclass
class RealImage:
    """An image file made by mke2fs."""

    path: Path

    @classmethod
    def make(cls, path: Path, kind: str, *options: str) -> RealImage:
        """A file system with a journal of 4 MiB."""
        with path.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        command = [need_tool("mke2fs"), "-q", "-t", kind, "-b", str(BLOCK_BYTES), "-J", "size=4"]
        subprocess.run([*command, *options, str(path)], check=True, capture_output=True)
        return cls(path)

    def copy(self, name: str) -> RealImage:
        """A copy beside it."""
        return RealImage(Path(shutil.copyfile(self.path, self.path.with_name(name))))

    def debugfs(self, *requests: str, write: bool = False) -> str:
        """What debugfs answers; it must not complain."""
        command = [need_tool("debugfs"), *(["-w"] if write else []), "-f", "-", str(self.path)]
        done = subprocess.run(
            command, input="\n".join(requests), capture_output=True, text=True, check=True
        )
        complaints = [line for line in done.stderr.splitlines() if not line.startswith("debugfs 1")]
        assert not complaints, complaints
        return done.stdout

    def blocks_of(self, name: str) -> list[int]:
        """The data blocks of a file, in order."""
        runs = _RUN.findall(self.debugfs(f"stat {name}").replace("\n", " "))
        blocks: dict[int, int] = {}
        for first, last, start, _end in runs:
            for step in range(int(last or first) - int(first) + 1):
                blocks[int(first) + step] = int(start) + step
        assert sorted(blocks) == list(range(len(blocks)))
        return [blocks[index] for index in range(len(blocks))]

    @contextlib.contextmanager
    def area(self) -> Iterator[Area]:
        """The journal, for ours, on a device in memory that is saved at the end."""
        device = self.contents()
        before = list(device.contents)
        yield Area(device, self.blocks_of(JOURNAL))
        with self.path.open("r+b") as file:
            for number, content in enumerate(device.contents):
                if content is not before[number]:
                    file.seek(number * BLOCK_BYTES)
                    file.write(content)

    def need_recovery(self) -> None:
        """Set the flag that makes Linux and e2fsck look into the journal."""
        with self.path.open("r+b") as file:
            file.seek(_SUPER_OFFSET)
            raw = bytearray(file.read(_SUPER_BYTES))
            (flags,) = struct.unpack_from("<I", raw, _INCOMPAT_OFFSET)
            struct.pack_into("<I", raw, _INCOMPAT_OFFSET, flags | _NEEDS_RECOVERY)
            if any(raw[-4:]):
                struct.pack_into("<I", raw, _SUPER_BYTES - 4, checksum(0xFFFF_FFFF, raw[:-4]))
            file.seek(_SUPER_OFFSET)
            file.write(raw)

    def e2fsck(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run e2fsck."""
        command = [need_tool("e2fsck"), *options, str(self.path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def replay_by_e2fsck(self) -> None:
        """Let e2fsck replay the journal and do nothing else."""
        done = self.e2fsck("-y", "-E", "journal_only")
        assert done.returncode in {0, 1}, done.stdout + done.stderr

    def contents(self) -> MemoryDevice:
        """All blocks."""
        data = self.path.read_bytes()
        return MemoryDevice(
            [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]
        )

    @contextlib.contextmanager
    def mounted(self, options: str) -> Iterator[Path]:
        """Mount it with Linux's own file system; skips where that is not allowed."""
        if os.geteuid() != 0:
            pytest.skip("only root may mount an image")
        where = self.path.with_name(f"{self.path.name}.mounted")
        where.mkdir(exist_ok=True)
        command = [need_tool("mount"), "-o", f"loop,{options}", str(self.path), str(where)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and re.search(
            r"permission denied|not permitted|unknown filesystem|loop device", done.stderr
        ):
            pytest.skip(f"this machine can't mount an image: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        try:
            yield where
        finally:
            subprocess.run([need_tool("umount"), str(where)], check=True, capture_output=True)

    def tree_by_linux(self) -> dict[str, object]:
        """The tree, after Linux has replayed what there is to replay."""
        with self.mounted("rw") as where:
            return host_tree(where)


def differences(ours: RealImage, theirs: RealImage) -> list[int]:
    """Blocks that differ, but for block 0: e2fsck and Linux note the recovery there."""
    left, right = ours.contents().contents, theirs.contents().contents
    return [number for number in range(1, len(left)) if left[number] != right[number]]
