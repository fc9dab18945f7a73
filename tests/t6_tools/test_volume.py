"""`tmem mkfs`, `tmem fsck` and `tmem fs stat IMAGE`: what they say and their exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.ocfs2 import Volume, debugfs, faults, make_volume, write
from tests.support.tools import need_tool
from tools.cli import main


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, output and error output of a command."""
    code = main([str(word) for word in words])
    output, errors = capsys.readouterr()
    return code, output, errors


def test_made_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new volume is clean; one flipped bit is one line and exit code 1."""
    image = tmp_path / "image"
    uuid = "00112233-4455-6677-8899-aabbccddeeff"
    words: list[str | Path] = [
        "mkfs",
        image,
        "--size",
        "32M",
        "--slots",
        "2",
        "--label",
        "x",
        "--uuid",
        uuid,
    ]
    code, output, errors = run(capsys, *words)
    assert (code, errors) == (0, "")
    assert "32.0 MiB with 2 slots, uuid 00112233445566778899aabbccddeeff" in output
    assert run(capsys, "fsck", image) == (0, f"{image}: clean\n", "")

    with image.open("r+b") as file:
        file.seek(3 * 4096 + 0x40 + 900)
        file.write(b"\1")
    code, output, errors = run(capsys, "fsck", image)
    assert code == 1 and errors == ""
    assert "[CLUSTER_ALLOC_BIT] clusters 7200 to 7200: " in output
    assert output.endswith("problems; repair it with fsck.ocfs2 -fy\n")
    code, output, _ = run(capsys, "fsck", "--json", image)
    answer = json.loads(output)
    assert code == 1 and answer["damaged"] and not answer["clean"]
    assert "CLUSTER_ALLOC_BIT" in {problem["code"] for problem in answer["problems"]}


def test_a_volume_for_who_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has the feature that files of any size need, and Linux puts nothing into inodes."""
    image = tmp_path / "image"
    assert run(capsys, "mkfs", image, "--size", "32M", "--slots", "2", "--verify")[0] == 0
    assert "xattr" in run(capsys, "fs", "stat", image)[1]
    assert "Extended Attributes Inline Size: 0" in debugfs(image, "stats")
    assert faults(image) == []
    assert run(capsys, "fsck", image)[0] == 0


def test_what_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless --force says otherwise."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(32 << 20))
    before = image.read_bytes()
    code, output, errors = run(capsys, "mkfs", image)
    assert (code, output) == (64, "")
    assert "overwrite it with --force" in errors
    assert image.read_bytes() == before
    assert run(capsys, "mkfs", image, "--force", "--slots", "2")[0] == 0
    assert run(capsys, "fsck", image)[0] == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 64, "say how large it shall be with --size"),
        (["--size", "much"], 64, "'much' is no size"),
        (["--size", "8M"], 64, "is too small: 4 slots with journals of 4 MiB need 28 MiB"),
        (["--size", "64M", "--slots", "33"], 64, "can't have 33 slots; take 1 to 32"),
        (["--size", "64M", "--journal", "1M"], 64, "take 4 to 256 MiB"),
        (["--size", "64M", "--uuid", "7"], 64, "'7' is no uuid"),
    ],
)
def test_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    """And no file is left behind."""
    image = tmp_path / "image"
    got, output, errors = run(capsys, "mkfs", image, *words)
    assert (got, output) == (code, "")
    assert says in errors and errors.count("\n") == 1
    assert not image.exists()


def test_not_to_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file, noise, and an ext image, for which e2fsck is named."""
    ext = tmp_path / "ext"
    ext.write_bytes(bytes(4 << 20))
    subprocess.run([need_tool("mke2fs"), "-q", str(ext)], check=True, capture_output=True)
    empty = tmp_path / "empty"
    empty.touch()
    noise = tmp_path / "noise"
    noise.write_bytes(b"noise" * 10_000)
    for path, says in (
        (tmp_path / "missing", "no such file; make it with tmem mkfs"),
        (empty, "only 0 bytes long; make it again with tmem mkfs"),
        (noise, "holds no OCFS2 volume"),
        (ext, f"checks OCFS2; use e2fsck -fn {ext}"),
    ):
        code, output, errors = run(capsys, "fsck", path)
        assert (code, output) == (66, "")
        assert says in errors and errors.count("\n") == 1


def test_stat_of_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As debugfs.ocfs2 has it: features, and for each slot whose it is and its journal."""
    path = make_volume(tmp_path / "volume", slots=3)
    volume = Volume(path)
    vfs = volume.mount(node=7)
    write(vfs, "/f", b"f" * 100_000)
    vfs.sync()
    # It dies here, as far as this copy is concerned.
    dead = tmp_path / "dead"
    dead.write_bytes(path.read_bytes())
    volume.unmount()
    slots: list[dict[str, Any]] = []
    for image, free in ((path, True), (dead, False)):
        before = image.read_bytes()
        code, output, errors = run(capsys, "fs", "stat", image, "--json")
        assert (code, errors) == (0, "")
        assert image.read_bytes() == before
        (stat,) = json.loads(output).values()
        stats = debugfs(image, "stats")
        named = re.findall(r"Feature (?:Compat|Incompat|RO compat): \d+ (\S*)", stats)
        assert stat["features"] == [name for name in named if name]
        assert stat["uuid"].upper() in stats
        slots = stat["slots"]
        assert [slot["node"] for slot in slots] == [None if free else "node 7", None, None]
        assert [slot["journal"] for slot in slots] == ["clean" if free else "dirty", *["clean"] * 2]
        for slot in slots:
            dumped = debugfs(image, f"logdump {slot['slot']}")
            assert f"First Commit ID: {slot['sequence']} " in dumped
    assert slots[0]["sequence"] > slots[1]["sequence"]

    # Once it was recovered, that is told too.
    recovered = Volume(dead)
    recovered.mount(node=9)
    recovered.unmount()
    code, output, errors = run(capsys, "fs", "stat", dead)
    table, slot_table = output.split("\n\n")
    assert table.splitlines()[0].split()[:2] == ["IMAGE", "TYPE"]
    assert "strict-journal-super,extended-slotmap" in table
    first = slot_table.splitlines()[1].split()
    assert (first[1:4], first[5]) == (["0", "free", "clean"], "1")
    assert int(first[4]) > slots[0]["sequence"]


def test_stat_of_what_is_no_volume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An ext2 image has features and no slots; nothing, and two things at once, are refused."""
    ext = tmp_path / "ext"
    ext.write_bytes(bytes(4 << 20))
    command = [need_tool("mke2fs"), "-q", "-t", "ext2", "-b", "4096", str(ext)]
    subprocess.run(command, check=True, capture_output=True)
    code, output, _ = run(capsys, "fs", "stat", ext, "--json")
    (stat,) = json.loads(output).values()
    dumped = subprocess.run(
        [need_tool("dumpe2fs"), "-h", str(ext)], check=True, capture_output=True, text=True
    )
    assert f"Filesystem features:      {' '.join(stat['features'])}" in dumped.stdout
    assert (stat["type"], stat["slots"]) == ("ext2", [])
    assert run(capsys, "fs", "stat", ext)[1].count("\n") == 2
    for words, code, says in (
        ([tmp_path / "none"], 66, "none: no such file; make it with tmem mkfs"),
        ([ext, "--guest", "red"], 64, "name an image or a guest, not both"),
    ):
        got, output, errors = run(capsys, "fs", "stat", *words)
        assert (got, output) == (code, "")
        assert says in errors and errors.count("\n") == 1
