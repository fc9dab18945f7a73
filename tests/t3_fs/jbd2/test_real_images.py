"""Journals of real ext3 and ext4 images: what we, e2fsck and Linux make of them is the same."""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path

import pytest

from fs.block.device import BLOCK_BYTES
from fs.jbd2.area import Area
from fs.jbd2.format import MAGIC_BYTES, Superblock
from fs.jbd2.journal import Journal, format_journal
from fs.jbd2.recovery import Recovered, recover
from tests.t3_fs.jbd2.journals import FORMS, clock, image
from tests.t3_fs.jbd2.real import RealImage, differences

FILE_BLOCKS = 40


def with_file(path: Path, kind: str, *options: str) -> tuple[RealImage, list[int]]:
    """An image with one file, whose blocks the tests log."""
    made = RealImage.make(path, kind, *options)
    source = path.with_name("source")
    source.write_bytes(b"-" * (FILE_BLOCKS * BLOCK_BYTES))
    made.debugfs(f"write {source} file", write=True)
    return made, made.blocks_of("/file")


def superblock(area: Area) -> Superblock:
    """The journal's superblock."""
    return Superblock(area.read(0), len(area))


def judge_recovery(crashed: RealImage) -> Recovered:
    """Ours and e2fsck's recovery leave the same blocks, and Linux's gives the same tree."""
    ours, theirs = crashed.copy("ours"), crashed.copy("theirs")
    with ours.area() as area:
        told = recover(area, read_only=True)
        found = recover(area)
        assert found == told
        own = superblock(area)
    theirs.replay_by_e2fsck()
    with theirs.area() as area:
        other = superblock(area)
        own_block = area.blocks[0]
    assert (own.start, own.sequence) == (other.start, other.sequence)
    assert set(differences(ours, theirs)) <= {own_block}
    tree = crashed.copy("linux").tree_by_linux()
    assert tree
    assert ours.tree_by_linux() == tree
    assert theirs.tree_by_linux() == tree
    return found


def transactions(area: Area, blocks: list[int], rng: random.Random) -> dict[int, bytes]:
    """Log many images of these blocks, so that the log wraps; what they hold in the end."""
    journal = Journal(area, now_ns=clock)
    model = dict.fromkeys(blocks, b"-" * BLOCK_BYTES)
    for number in range(60):
        chosen = rng.sample(blocks, rng.randrange(1, len(blocks)))
        writes = {block: image(rng) for block in chosen}
        dropped = blocks[number % len(blocks)]
        journal.commit(writes, {dropped})
        model.pop(dropped, None)
        model |= writes
        if number % 7 == 3:
            # Freed, and then written as data.
            freed = rng.choice(blocks)
            journal.forget(freed)
            journal.commit({})
            model[freed] = image(rng)
            area.device.write(freed, 1, model[freed])
            area.device.flush()
    assert superblock(area).start > 1  # the log has wrapped
    return model


@pytest.mark.parametrize("form", FORMS)
def test_our_journal(tmp_path: Path, form: str) -> None:
    """A log of ours is replayed alike by us, by e2fsck and by Linux, and debugfs reads the same."""
    kind = ("ext4", "-O", "metadata_csum") if "v3" in form else ("ext3",)
    made, blocks = with_file(tmp_path / "image", *kind)
    compat, incompat = FORMS[form]
    with made.area() as area:
        format_journal(area, superblock(area).uuid, compat=compat, incompat=incompat)
        model = transactions(area, blocks, random.Random(form))
    made.need_recovery()
    found = judge_recovery(made)
    assert found.transactions > 10
    assert found.revoked_blocks > 0
    with made.copy("file").mounted("rw") as where:
        data = (where / "file").read_bytes()
    assert len(model) > FILE_BLOCKS // 2
    for number, block in enumerate(blocks):
        if block in model:
            assert data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES] == model[block]


def test_logdump_reads_what_we_wrote(tmp_path: Path) -> None:
    """Each image and revoke record of ours, at its place in the log, is what debugfs prints."""
    made, blocks = with_file(tmp_path / "image", "ext3")
    with made.area() as area:
        journal = Journal(area, now_ns=clock)
        journal.commit({blocks[3]: MAGIC_BYTES.ljust(BLOCK_BYTES), blocks[1]: bytes(BLOCK_BYTES)})
        journal.commit({blocks[2]: bytes(BLOCK_BYTES)}, [blocks[3]])
        first = journal.recovered.next_sequence
    dump = made.debugfs("logdump -a")
    logged = re.findall(r"FS block (\d+) logged at .*?journal block (\d+) \(flags (\w+)\)", dump)
    assert logged == [
        (str(blocks[1]), "2", "0x0"),
        (str(blocks[3]), "3", "0xb"),
        (str(blocks[2]), "7", "0x8"),
    ]
    assert re.findall(r"Revoke FS block (\d+)", dump) == [str(blocks[3])]
    kinds = re.findall(r"expected sequence (\d+), type (\d).* at block (\d+)", dump)
    assert [tuple(map(int, kind)) for kind in kinds] == [
        (first, 1, 1),
        (first, 2, 4),
        (first + 1, 5, 5),
        (first + 1, 1, 6),
        (first + 1, 2, 8),
    ]


def change_tree(root: Path, seed: int) -> None:
    """Make and remove enough that blocks of directories are freed, and with that revoked."""
    rng = random.Random(seed)
    for number in range(3):
        folder = root / f"folder{seed}-{number}"
        folder.mkdir()
        for name in range(60):
            (folder / f"{name:03}{'x' * 200}").symlink_to("y" * 100)
        (folder / "data").write_bytes(rng.randbytes(rng.randrange(200_000)))
        # Starts as the journal's own blocks do: data=journal has to escape it.
        (folder / "magic").write_bytes(MAGIC_BYTES * 3000)
    os.sync()
    shutil.rmtree(root / f"folder{seed}-1")
    after = os.open(root / f"after{seed}", os.O_WRONLY | os.O_CREAT)
    os.write(after, rng.randbytes(9000))
    # A commit alone: sync would also write the metadata home, and leave nothing to replay.
    os.fsync(after)
    os.close(after)


@pytest.mark.parametrize(
    ("kind", "options", "mount"),
    [
        ("ext3", (), "data=journal"),
        ("ext4", (), "data=journal"),
        ("ext4", (), "data=ordered"),
        ("ext4", ("-O", "^metadata_csum,^64bit"), "data=journal,journal_checksum"),
        ("ext4", ("-O", "^metadata_csum"), "data=writeback,journal_async_commit"),
    ],
    ids=["ext3-data", "ext4-data", "ext4", "checksum-v1", "async-commit"],
)
def test_linux_journal(tmp_path: Path, kind: str, options: tuple[str, ...], mount: str) -> None:
    """A file system that is copied while Linux uses it has a journal to replay."""
    made = RealImage.make(tmp_path / "image", kind, *options)
    with made.mounted(mount) as where:
        change_tree(where, 1)
        change_tree(where, 2)
        crashed = made.copy("crashed")
    found = judge_recovery(crashed)
    assert found.transactions > 0
    assert found.replayed_blocks > 0


@pytest.mark.parametrize(
    ("kind", "opening", "revoke"),
    [
        ("ext3", "jo", True),
        # With revoke blocks the checksum that debugfs computes is not Linux's.
        ("ext3", "jo -c", False),
        ("ext4", "jo -c -v 2", True),
        ("ext4", "jo -c -v 3", True),
    ],
    ids=["plain", "checksum-v1", "checksum-v2", "checksum-v3"],
)
def test_debugfs_journal(tmp_path: Path, kind: str, opening: str, revoke: bool) -> None:
    """The order is another one there: revoke blocks come after their transaction's images."""
    made, blocks = with_file(tmp_path / "image", kind)
    source = tmp_path / "images"
    source.write_bytes(MAGIC_BYTES.ljust(BLOCK_BYTES, b"a") + b"b" * BLOCK_BYTES)
    revokes = f"-r {blocks[1]},{blocks[3]}" if revoke else ""
    made.debugfs(
        opening,
        f"jw -b {blocks[0]},{blocks[1]} {source}",
        f"jw -b {blocks[2]},{blocks[3]} {revokes} {source}",
        "jc",
        write=True,
    )
    found = judge_recovery(made)
    revoked = 2 if revoke else 0
    assert found == Recovered(2, 4 - revoked, revoked, found.next_sequence)
