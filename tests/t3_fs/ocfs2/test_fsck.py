"""Every check of our checker: one field is damaged, the code is reported, fsck.ocfs2 agrees."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fs.block.faulty import FaultyDevice
from fs.errors import ImageError
from fs.ocfs2.flags import InodeFlag
from fs.ocfs2.format import (
    GROUP_BITMAP_OFFSET,
    ID2_OFFSET,
    LOCAL_ALLOC_BITMAP_OFFSET,
    SLOT_ENTRY,
    TRUNCATE_RECORD,
    ChainListHeader,
    ChainRecord,
    Dinode,
    ExtentBlock,
    GroupDescriptor,
    LocalAlloc,
    SuperBlock,
    TruncateLogHeader,
    chain_offset,
)
from fs.ocfs2.fsck.checker import check
from fs.ocfs2.fsck.marks import Marks, runs
from tests.support.ocfs2 import faults
from tests.t3_fs.ocfs2.damage import ROOT, SYSTEM_DIR, Memory, Sample, make_sample

Damage = Callable[[Sample], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The undamaged image."""
    return make_sample(tmp_path_factory.mktemp("sample") / "image")


@pytest.fixture
def sample(good: bytes, tmp_path: Path) -> Sample:
    """A copy to damage."""
    return Sample(tmp_path / "image", good)


def file1(sample: Sample) -> int:
    """Inode of a small file."""
    return sample.find(b"folder", b"file1")


def inode(*names: bytes, **values: object) -> Damage:
    """Fields of the inode at a path."""
    return lambda sample: sample.change(Dinode, sample.find(*names), **values)


def system(name: bytes, **values: object) -> Damage:
    """Fields of a system inode."""
    return lambda sample: sample.change(Dinode, sample.system[name], **values)


def chain_list(name: bytes, **values: object) -> Damage:
    """Fields of an allocator's chain list."""
    return lambda sample: sample.change(ChainListHeader, sample.system[name], **values)


def chain(name: bytes, **values: object) -> Damage:
    """Fields of an allocator's first chain."""
    return lambda sample: sample.change(ChainRecord, sample.system[name], chain_offset(0), **values)


def group(name: bytes, **values: object) -> Damage:
    """Fields of an allocator's first group."""
    return lambda sample: sample.change(GroupDescriptor, sample.group(name), **values)


def group_loop(sample: Sample) -> None:
    """A group that is its own successor."""
    block = sample.group(b"inode_alloc:0000")
    sample.change(GroupDescriptor, block, next_group=block)


def duplicate_group(sample: Sample) -> None:
    """Slot 1 has the group of slot 0."""
    block = sample.group(b"inode_alloc:0000")
    sample.change(ChainListHeader, sample.system[b"inode_alloc:0001"], used=1)
    sample.change(ChainRecord, sample.system[b"inode_alloc:0001"], chain_offset(0), block=block)


def group_bit(name: bytes, bit: int) -> Damage:
    """Another value of a bit."""
    return lambda sample: sample.flip(sample.group(name), bit, GROUP_BITMAP_OFFSET)


def bit_of_file(sample: Sample) -> None:
    """A cluster in use is free."""
    sample.flip(3, sample.data_block(file1(sample)), GROUP_BITMAP_OFFSET)


def last_bit(sample: Sample) -> None:
    """A cluster that nobody has is taken."""
    sample.flip(3, 6143, GROUP_BITMAP_OFFSET)


def free_inode_bit(sample: Sample) -> None:
    """An inode in use is free."""
    block = sample.group(b"inode_alloc:0000")
    sample.flip(block, file1(sample) - block, GROUP_BITMAP_OFFSET)


def extent(index: int = 0, **values: int) -> Damage:
    """Fields of an extent of a small file."""
    return lambda sample: sample.extent(file1(sample), index, **values)


def shared_cluster(sample: Sample) -> None:
    """Two files have one cluster."""
    sample.extent(file1(sample), 0, block=sample.data_block(sample.find(b"folder", b"file2")))


def leaf(**values: object) -> Damage:
    """Fields of an extent block."""

    def damage(sample: Sample) -> None:
        sample.change(ExtentBlock, sample.inner(sample.find(b"big0"), 0).block, **values)

    return damage


def leaf_list(**values: object) -> Damage:
    """Fields of the list in an extent block."""
    return lambda sample: sample.list_head(sample.inner(sample.find(b"big0"), 0).block, **values)


def leaf_extent(index: int, **values: int) -> Damage:
    """Fields of an extent in an extent block."""

    def damage(sample: Sample) -> None:
        sample.extent(sample.inner(sample.find(b"big0"), 0).block, index, **values)

    return damage


def inner_block(target: Callable[[Sample], int]) -> Damage:
    """Another block where a tree goes on."""

    def damage(sample: Sample) -> None:
        at = ID2_OFFSET + 16 + 8
        sample.block(sample.find(b"big0"))[at : at + 8] = target(sample).to_bytes(8, "little")

    return damage


def list_head(**values: object) -> Damage:
    """Fields of the list in a small file."""
    return lambda sample: sample.list_head(file1(sample), **values)


def entry(name: bytes, **values: object) -> Damage:
    """Fields of a directory entry."""
    return lambda sample: sample.entry(sample.find(b"folder"), name, **values)  # type: ignore[arg-type]


def second_parent(sample: Sample) -> None:
    """A directory has two names."""
    folder = sample.find(b"folder")
    sample.entry(folder, b"file3", target=sample.find(b"folder", b"inner"), kind=2)


def end_of_target(sample: Sample) -> None:
    """A target ends too early."""
    at = ID2_OFFSET + 3
    sample.block(sample.find(b"short"))[at : at + 1] = b"\0"


def endless_target(sample: Sample) -> None:
    """A target does not end."""
    sample.block(sample.find(b"short"))[ID2_OFFSET:] = b"x" * (4096 - ID2_OFFSET)


def loose(sample: Sample) -> None:
    """A directory that contains itself and has no other name."""
    inner = sample.find(b"folder", b"inner")
    sample.entry(sample.find(b"folder"), b"inner", target=0)
    sample.entry(inner, b"..", target=inner)


def slot_map(slot: int, valid: int, node: int) -> Damage:
    """An entry of the slot map."""

    def damage(sample: Sample) -> None:
        block = sample.block(sample.data_block(sample.system[b"slot_map"]))
        SLOT_ENTRY.pack_into(block, slot * SLOT_ENTRY.size, valid, node)

    return damage


def local_alloc(total: int, used: int, first: int, bits: int = 0, /, **values: object) -> Damage:
    """A window of slot 0."""

    def damage(sample: Sample) -> None:
        block = sample.system[b"local_alloc:0000"]
        sample.change(Dinode, block, id1_high=total, id1_low=used)
        sample.change(LocalAlloc, block, first_cluster=first, **values)
        at = LOCAL_ALLOC_BITMAP_OFFSET
        sample.block(block)[at : at + 8] = bits.to_bytes(8, "little")

    return damage


def truncate_log(start: int, count: int, /, **values: object) -> Damage:
    """A record of slot 0."""

    def damage(sample: Sample) -> None:
        block = sample.system[b"truncate_log:0000"]
        sample.change(TruncateLogHeader, block, **({"used": 1} | values))
        TRUNCATE_RECORD.pack_into(sample.block(block), ID2_OFFSET + 8, start, count)

    return damage


def journal(at: int, value: bytes) -> Damage:
    """Bytes of a journal superblock."""

    def damage(sample: Sample) -> None:
        block = sample.data_block(sample.system[b"journal:0000"])
        sample.block(block)[at : at + len(value)] = value

    return damage


def no_system_file(name: bytes) -> Damage:
    """A system file under another name."""
    return lambda sample: sample.entry(SYSTEM_DIR, name, text=b"X")


INODES = b"inode_alloc:0000"
EXTENTS = b"extent_alloc:0000"
BITMAP = b"global_bitmap"

# Name: code, damage, and False where fsck.ocfs2 -fn does not look at it.
DAMAGES: dict[str, tuple[str, Damage, bool]] = {
    "chain count": ("CHAIN_COUNT", chain_list(INODES, count=500), True),
    "chains used": ("CHAIN_NEXT_FREE", chain_list(INODES, used=244), True),
    "chain without group": ("CHAIN_EMPTY", chain(INODES, block=0), True),
    "chain head": ("CHAIN_HEAD_LINK_RANGE", chain(INODES, block=1 << 40), True),
    "chain link": ("CHAIN_LINK_RANGE", group(INODES, next_group=1 << 40), True),
    "chain magic": ("CHAIN_LINK_MAGIC", group(INODES, signature=b"GROUP02\0"), True),
    "chain bits": ("CHAIN_BITS", chain(INODES, free=7), True),
    "allocator clusters": ("CHAIN_I_CLUSTERS", system(INODES, clusters=7), True),
    "allocator size": ("CHAIN_I_SIZE", system(INODES, size=7), True),
    "allocator bits": ("CHAIN_GROUP_BITS", system(INODES, id1_low=7), True),
    "clusters of a group": ("CHAIN_CPG", chain_list(BITMAP, clusters_per_group=77), True),
    "group loop": ("GROUP_CHAIN_LOOP", group_loop, True),
    "group of two": ("GROUP_DUPLICATE", duplicate_group, True),
    "group generation": ("GROUP_GEN", group(INODES, generation=7), True),
    "group parent": ("GROUP_PARENT", group(INODES, parent=7), True),
    "group block": ("GROUP_BLKNO", group(INODES, block=7), True),
    "group chain": ("GROUP_CHAIN", group(INODES, chain=7), True),
    "group free bits": ("GROUP_FREE_BITS", group(INODES, free=2000), True),
    "group size": ("GROUP_BITS", group(BITMAP, bits=6000), True),
    "volume size": (
        "SUPERBLOCK_CLUSTERS",
        lambda sample: sample.change(Dinode, 2, clusters=6000),
        True,
    ),
    "cluster free": ("CLUSTER_ALLOC_BIT", bit_of_file, True),
    "cluster lost": ("CLUSTER_ALLOC_BIT", last_bit, True),
    "inode free": ("INODE_ALLOC_REPAIR", free_inode_bit, True),
    "inode lost": ("INODE_ALLOC_REPAIR", group_bit(INODES, 700), True),
    "extent block free": ("EB_ALLOC", group_bit(EXTENTS, 1), False),
    "extent block lost": ("EB_ALLOC", group_bit(EXTENTS, 700), False),
    "inode magic": (
        "INODE_ALLOC_REPAIR",
        inode(b"folder", b"file1", signature=b"INODE02\0"),
        True,
    ),
    "inode generation": ("INODE_GEN", inode(b"folder", b"file1", fs_generation=7), True),
    "inode block": ("INODE_BLKNO", inode(b"folder", b"file1", block=7), True),
    "inode bit": ("INODE_SUBALLOC", inode(b"folder", b"file1", suballoc_bit=7), False),
    "inode slot": ("INODE_SUBALLOC", inode(b"folder", b"file1", suballoc_slot=1), True),
    "inode deleted": ("INODE_NZ_DTIME", inode(b"folder", b"file1", dtime_s=7), True),
    "inode invalid": ("INODE_FLAGS", inode(b"folder", b"file1", flags=0), True),
    "inode orphan": (
        "INODE_FLAGS",
        inode(b"folder", b"file1", flags=InodeFlag.VALID | InodeFlag.ORPHANED),
        False,
    ),
    "inode feature": ("INODE_FLAGS", inode(b"folder", b"file1", dyn_features=0x10), True),
    "inode kind": ("INODE_MODE", inode(b"folder", b"file1", mode=0o644), True),
    "file size": ("INODE_SIZE", inode(b"folder", b"file1", size=50_000), True),
    "directory size": ("INODE_SIZE", inode(b"folder", size=5000), True),
    "file clusters": ("INODE_CLUSTERS", inode(b"folder", b"file1", clusters=7), True),
    "empty directory": (
        "DIR_ZERO",
        lambda sample: sample.list_head(sample.find(b"folder", b"inner"), used=0),
        True,
    ),
    "link target": ("LINK_SIZE", end_of_target, False),
    "link size": ("LINK_SIZE", inode(b"short", size=3), False),
    "link end": ("LINK_NULLTERM", endless_target, False),
    "link data": ("LINK_FAST_DATA", inode(b"short", size=5000), False),
    "link blocks": ("LINK_BLOCKS", inode(b"long", size=9000), True),
    "extent block magic": ("EXTENT_EB_INVALID", leaf(signature=b"EXBLK02\0"), True),
    "extent block number": ("EB_BLKNO", leaf(block=7), True),
    "extent block generation": ("EB_GEN", leaf(fs_generation=7), True),
    "extent block bit": ("EB_ALLOC", leaf(suballoc_bit=7), False),
    "extent block next": ("EB_NEXT_LEAF", leaf(next_leaf=7), False),
    "extent block range": ("EXTENT_BLKNO_RANGE", inner_block(lambda _sample: 1 << 40), True),
    "extent block twice": (
        "EB_DUPLICATE",
        inner_block(lambda sample: sample.inner(sample.find(b"big1"), 0).block),
        True,
    ),
    "tree depth": ("EXTENT_LIST_DEPTH", leaf_list(depth=1), True),
    "tree too deep": ("EXTENT_LIST_DEPTH", list_head(depth=99), True),
    "list count": ("EXTENT_LIST_COUNT", list_head(count=7), False),
    "list used": ("EXTENT_LIST_FREE", list_head(used=999), True),
    "extent range": ("EXTENT_BLKNO_RANGE", extent(block=1 << 40), True),
    "extent overrun": ("EXTENT_CLUSTERS_OVERRUN", extent(clusters=60_000), True),
    "extent unwritten": ("EXTENT_MARKED_UNWRITTEN", extent(flags=1), True),
    "extent refcounted": ("EXTENT_MARKED_REFCOUNTED", extent(flags=2), True),
    "extent hole": ("NO_HOLES", leaf_extent(5, first=6), False),
    "extent overlap": ("EXTENT_OVERLAP", leaf_extent(5, first=3), True),
    "cluster of two": ("DUP_CLUSTERS_CLONE", shared_cluster, True),
    "entry length": ("DIRENT_LENGTH", entry(b"file1", length=6), True),
    "entry name length": ("DIRENT_LENGTH", entry(b"file1", name_bytes=200), True),
    "entry without name": ("DIRENT_ZERO", entry(b"file1", name_bytes=0), True),
    "entry characters": ("DIRENT_NAME_CHARS", entry(b"file1", text=b"fi/e1"), False),
    "entry range": ("DIRENT_INODE_RANGE", entry(b"file1", target=1 << 40), True),
    "entry of free inode": ("DIRENT_INODE_FREE", entry(b"file1", target=6000), True),
    "entry kind": ("DIRENT_TYPE", entry(b"file1", kind=2), True),
    "name twice": ("DIRENT_DUPLICATE", entry(b"file1", text=b"file2"), True),
    "dot name": ("DIRENT_NOT_DOTTY", entry(b".", text=b"x"), True),
    "dot inode": ("DIRENT_DOT_INODE", entry(b".", target=ROOT), True),
    "dot twice": ("DIRENT_DOTTY_DUP", entry(b"file1", text=b"..", name_bytes=2), True),
    "parent": (
        "DIR_DOTDOT",
        lambda sample: sample.entry(sample.find(b"folder", b"inner"), b"..", target=ROOT),
        True,
    ),
    "two parents": ("DIR_PARENT_DUP", second_parent, True),
    "loose directory": ("DIR_NOT_CONNECTED", loose, True),
    "loose file": ("INODE_NOT_CONNECTED", entry(b"file5", target=0), True),
    "names": ("INODE_COUNT", inode(b"folder", b"file1", nlink=7), True),
    "names of a directory": ("INODE_COUNT", inode(b"folder", nlink=7), True),
    "root kind": (
        "ROOT_NOTDIR",
        lambda sample: sample.change(Dinode, ROOT, mode=0o100644),
        True,
    ),
    "root magic": (
        "ROOT_DIR_MISSING",
        lambda sample: sample.change(Dinode, ROOT, signature=b"INODE02\0"),
        True,
    ),
    "no lost+found": (
        "LOSTFOUND_MISSING",
        lambda sample: sample.entry(ROOT, b"lost+found", text=b"lost-found"),
        True,
    ),
    "no orphan_dir": ("ORPHAN_DIR_MISSING", no_system_file(b"orphan_dir:0001"), True),
    "no journal": ("JOURNAL_FILE_INVALID", no_system_file(b"journal:0001"), True),
    "no slot_map": ("SYSTEM_FILE", no_system_file(b"slot_map"), False),
    "system flags": ("SYSTEM_FILE", system(b"heartbeat", flags=1), False),
    "journal magic": ("JOURNAL_FILE_INVALID", journal(0, b"\0\0"), False),
    "journal feature": ("JOURNAL_UNKNOWN_FEATURE", journal(0x28, b"\0\x80\0\0"), False),
    "journal size": (
        "JOURNAL_TOO_SMALL",
        lambda sample: sample.extent(sample.system[b"journal:0000"], 0, clusters=500),
        True,
    ),
    "journal dirty": ("JOURNAL_DIRTY", system(b"journal:0000", id1_low=1), False),
    "slot in use": ("SLOT_IN_USE", slot_map(1, 1, 3), False),
    "slot of nobody": ("SLOT_MAP", slot_map(1, 1, 999), False),
    "slot beyond": ("SLOT_MAP", slot_map(9, 1, 3), False),
    "local alloc size": ("LALLOC_SIZE", local_alloc(0, 0, 0, bitmap_bytes=7), False),
    "local alloc used": ("LALLOC_NZ_USED", local_alloc(0, 7, 0), True),
    "local alloc start": ("LALLOC_NZ_BM", local_alloc(0, 0, 7), True),
    "local alloc bits": ("LALLOC_CLEAR", local_alloc(0, 0, 0, 7), False),
    "local alloc large": ("LALLOC_BM_SIZE", local_alloc(40_000, 0, 3000), True),
    "local alloc beyond": ("LALLOC_BM_OVERRUN", local_alloc(64, 0, 1 << 30), True),
    "local alloc overused": ("LALLOC_USED_OVERRUN", local_alloc(64, 65, 6000), True),
    "local alloc counts": ("LALLOC_USED", local_alloc(64, 3, 6000, 1), True),
    "truncate log count": ("DEALLOC_COUNT", truncate_log(0, 0, count=7, used=0), False),
    "truncate log used": ("DEALLOC_USED", truncate_log(0, 0, used=999), True),
    "truncate log start": ("TRUNCATE_REC_START_RANGE", truncate_log(1 << 30, 1), True),
    "truncate log range": ("TRUNCATE_REC_RANGE", truncate_log(6000, 9999), True),
    "superblock place": ("SUPERBLOCK", lambda sample: sample.change(Dinode, 2, block=7), True),
    "superblock root": (
        "SUPERBLOCK",
        lambda sample: sample.change(SuperBlock, 2, root_block=1 << 40),
        True,
    ),
    "superblock state": ("SUPERBLOCK", lambda sample: sample.change(SuperBlock, 2, state=1), False),
}


def test_good_image_is_good(sample: Sample) -> None:
    """Otherwise the rest would prove nothing."""
    assert sample.check() == []
    assert faults(sample.save()) == []


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(good: bytes, sample: Sample, name: str) -> None:
    """By our checker with the code, and by fsck.ocfs2 where it looks at the same thing."""
    code, damage, is_judged = DAMAGES[name]
    damage(sample)
    assert sample.raw != good

    problems = sample.check()

    assert code in {problem.code for problem in problems}, problems
    assert len(problems) < 600
    if is_judged:
        assert faults(sample.save()) != []


def test_only_pending_things_are_marked_so(sample: Sample) -> None:
    """What a mount does away with is not damage."""
    for name in ("journal dirty", "slot in use"):
        DAMAGES[name][1](sample)
    problems = sample.check()
    assert {problem.code for problem in problems} == {"JOURNAL_DIRTY", "SLOT_IN_USE"}
    assert all(problem.pending for problem in problems)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_never_crash_it(good: bytes, sample: Sample, seed: int) -> None:
    """60 images a seed, each with some bits of metadata flipped or blocks of noise."""
    rng = random.Random(seed)
    places = [2, 3, 4, *range(5, 24)]
    places += [sample.group(name) for name in (INODES, EXTENTS)]
    places += [sample.find(b"folder"), file1(sample), sample.find(b"big0"), sample.find(b"long")]
    places += [sample.inner(sample.find(b"big0"), index).block for index in range(2)]
    directories = (ROOT, SYSTEM_DIR, sample.find(b"folder"), sample.system[b"orphan_dir:0000"])
    places += [sample.data_block(ino) for ino in directories]
    places += [sample.data_block(sample.system[name]) for name in (b"journal:0000", b"slot_map")]
    found = 0
    damaged: set[int] = set()
    for number in range(60):
        while damaged:
            place = damaged.pop()
            sample.block(place)[:] = good[place * 4096 : (place + 1) * 4096]
        for _ in range(rng.randrange(1, 6)):
            place = rng.choice(places)
            damaged.add(place)
            block = sample.block(place)
            if rng.random() < 0.05:
                block[:] = rng.choice((rng.randbytes(4096), bytes(4096), b"\xff" * 4096))
            else:
                offset = rng.choice((rng.randrange(4096), rng.randrange(512), rng.randrange(128)))
                block[offset] ^= 1 << rng.randrange(8)
        try:
            found += bool(sample.check())
        except ImageError:
            found += 1
        except Exception as reason:
            raise AssertionError(f"seed {seed}, image {number}") from reason
    assert found > 20


def test_read_errors_are_told(sample: Sample) -> None:
    """Blocks that can't be read are problems, and the rest is checked."""
    bad = {file1(sample), sample.data_block(sample.find(b"folder", b"inner"))}
    problems = check(FaultyDevice(Memory(sample.raw), random.Random(0), bad_reads=bad))
    places = {problem.place for problem in problems if problem.code == "READ_ERROR"}
    assert places == {f"block {block}" for block in bad}


def test_other_contents_are_refused(tmp_path: Path, sample: Sample) -> None:
    """No volume at all, and a volume of another profile."""
    sample.change(SuperBlock, 2, incompat=0x100 | 0x40)
    with pytest.raises(ImageError, match="inline-data"):
        sample.check()
    sample.raw[:] = bytes(len(sample.raw))
    with pytest.raises(ImageError, match="holds no OCFS2 volume"):
        sample.check()


def test_marks_and_runs() -> None:
    """The same as sets do."""
    rng = random.Random(5)
    for _ in range(50):
        marks, model = Marks(300), set[int]()
        for _ in range(8):
            start = rng.randrange(300)
            count = rng.randrange(1, 301 - start)
            new = {bit for at, length in marks.mark(start, count) for bit in range(at, at + length)}
            assert new == set(range(start, start + count)) - model
            model |= set(range(start, start + count))
            number = sum(1 << bit for bit in model)
            assert marks.window(0, 300) == number
            assert {b for at, length in runs(number) for b in range(at, at + length)} == model
            assert all((bit in marks) == (bit in model) for bit in range(300))
