"""The part of the virtual machine's judge that needs no machine; `make vm-check` does the rest."""

from __future__ import annotations

import hashlib
import lzma
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ipc.errors import ExitCode, OperatorError
from tools.vm import __main__ as command
from tools.vm import kernel, modules, programs, report, tree, volume
from tools.vm.campaign import CHECKS
from tools.vm.cpio import Archive
from tools.vm.judge import Task, Verdict, judge_report
from tools.vm.story import Bad, Story
from tools.vm.tree import Entry
from tools.vm.volume import NotOcfs2

TOOLS_VM = Path(command.__file__).parent

# ---- the archive ----


def read_archive(data: bytes) -> list[tuple[str, int, bytes]]:
    """Name, mode and data of each entry, by the format's own description."""
    entries: list[tuple[str, int, bytes]] = []
    position = 0
    while True:
        assert position % 4 == 0
        assert data[position : position + 6] == b"070701"
        fields = [
            int(data[position + 6 + 8 * number : position + 14 + 8 * number], 16)
            for number in range(13)
        ]
        size, name_size = fields[6], fields[11]
        name_start = position + 110
        name = data[name_start : name_start + name_size]
        assert name.endswith(b"\0")
        start = (name_start + name_size + 3) & ~3
        position = (start + size + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert position == len(data)
            return entries
        entries.append((name[:-1].decode(), fields[1], data[start : start + size]))


def test_an_archive_holds_what_was_put_in() -> None:
    """Files of every length modulo 4, links and folders come back with their modes."""
    archive = Archive()
    for length in range(6):
        archive.file(f"d{'x' * length}/file", b"y" * length, executable=length % 2 == 1)
    archive.link("/sh", "busybox")
    archive.folder("/a/b/c/")
    archive.folder("a/b")

    entries = read_archive(archive.finish())

    by_name = {name: (mode, data) for name, mode, data in entries}
    assert len(by_name) == len(entries)
    assert by_name["sh"] == (stat.S_IFLNK | 0o777, b"busybox")
    assert by_name["dxxx/file"] == (stat.S_IFREG | 0o755, b"yyy")
    assert by_name["dxx/file"] == (stat.S_IFREG | 0o644, b"yy")
    assert by_name["a/b/c"] == (stat.S_IFDIR | 0o755, b"")


def test_folders_come_before_what_is_in_them() -> None:
    """Linux makes no parents by itself."""
    archive = Archive()
    archive.file("usr/lib/modules/one.ko", b"1")

    names = [name for name, _, _ in read_archive(archive.finish())]

    assert names == ["usr", "usr/lib", "usr/lib/modules", "usr/lib/modules/one.ko"]


@pytest.mark.parametrize("path", ["", "/", "TRAILER!!!", "twice", "n" * 5000])
def test_an_archive_refuses_what_it_can_not_hold(path: str) -> None:
    """No name, the name of the end, a name that is there, a name that is too long."""
    archive = Archive()
    archive.file("twice", b"")

    with pytest.raises(ValueError, match=r"can't be an entry|does not fit"):
        archive.file(path, b"")


# ---- the kernel and its modules ----

MODULES_DEP = """\
kernel/fs/ocfs2/ocfs2.ko: kernel/fs/jbd2/jbd2.ko kernel/fs/quota-tree.ko kernel/lib/base.ko
kernel/fs/jbd2/jbd2.ko: kernel/lib/base.ko
kernel/fs/quota-tree.ko:
kernel/lib/base.ko:
kernel/drivers/virtio-blk.ko.xz: kernel/drivers/virtio.ko.xz
kernel/drivers/virtio.ko.xz:
"""


def test_modules_come_after_what_they_need() -> None:
    """Each file once, whatever asks for it; `-` and `_` are the same in a name."""
    order = modules.load_order(MODULES_DEP, ["virtio_blk", "ocfs2", "quota_tree", "jbd2"])

    assert sorted(order) == sorted(line.partition(":")[0] for line in MODULES_DEP.splitlines())
    for line in MODULES_DEP.splitlines():
        file, _, needed = line.partition(":")
        assert all(order.index(other) < order.index(file) for other in needed.split())


def test_a_module_that_is_not_there_is_named() -> None:
    """A kernel for clouds has no OCFS2."""
    with pytest.raises(OperatorError, match="no module gfs2") as caught:
        modules.load_order(MODULES_DEP, ["gfs2"])

    assert caught.value.exit_code == ExitCode.INCONCLUSIVE


def test_a_module_is_unpacked(tmp_path: Path) -> None:
    """Debian 12 does not compress modules, later ones do; an unknown way is refused."""
    for name, data in (("a.ko", b"\x7fELF"), ("b.ko.xz", lzma.compress(b"\x7fELF"))):
        (tmp_path / name).write_bytes(data)
        assert modules.read_module(tmp_path / name) == b"\x7fELF"
    (tmp_path / "c.ko.zst").write_bytes(b"")
    with pytest.raises(OperatorError, match=r"c\.ko\.zst"):
        modules.read_module(tmp_path / "c.ko.zst")


def test_the_newest_kernel_package_is_taken() -> None:
    """What the meta package names, else the highest version on offer; kernels for clouds never."""
    depends = "linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n"
    search = "".join(
        f"linux-image-{name} - Linux for 64-bit PCs\n"
        for name in ("6.1.0-9-amd64", "6.1.0-56-cloud-amd64", "6.1.0-37-amd64", "6.1.0-56-rt-amd64")
    )

    assert kernel.newest_package(depends, search) == "linux-image-6.1.0-56-amd64"
    assert kernel.newest_package("", search) == "linux-image-6.1.0-37-amd64"
    assert kernel.newest_package("linux-image-amd64\n", "") is None


def test_a_kernel_with_a_missing_module_is_not_complete(tmp_path: Path) -> None:
    """So that a cache of another version of this program is made again."""
    (tmp_path / "vmlinuz").write_bytes(b"")
    found = kernel.Kernel("6.1", tmp_path)
    assert not found.complete
    lines = [f"{name}.ko:" for name in modules.WANTED]
    (tmp_path / "modules.dep").write_text("\n".join(lines))
    assert not found.complete
    for name in modules.WANTED:
        (tmp_path / f"{name}.ko").write_bytes(b"")
    assert found.complete


@pytest.mark.parametrize("name", ["init.sh", "work.sh"])
def test_the_scripts_of_the_machine_are_shell(name: str) -> None:
    """A syntax error would show only as a machine that does not come up."""
    subprocess.run(["sh", "-n", TOOLS_VM / name], check=True)


# ---- what the machine tells ----


def data(name: str, content: bytes) -> bytes:
    """A piece of data in a report."""
    return b"@ data %s %d\n%s" % (name.encode(), len(content), content)


def test_data_can_not_pass_for_a_step() -> None:
    """Names of files may look like anything; only their length counts."""
    text = b"@ mount started\n" + data("x-names", b"a\n@ mount ok\n@ unmount ok\n")

    told = report.parse(text + b"@ mount failed: no\n")

    assert told.results == {"mount": "failed: no"}
    assert told.data == {"x-names": b"a\n@ mount ok\n@ unmount ok\n"}


@pytest.mark.parametrize("cut", range(0, 51, 3))
def test_a_report_may_end_anywhere(cut: int) -> None:
    """A machine that dies tells nothing half: a piece of data is there whole or not at all."""
    text = b"@ ready ok\n" + data("x-names", b".\0./a\0") + b"@ list-x ok\n"

    told = report.parse(text[:cut])

    assert told.data in ({}, {"x-names": b".\0./a\0"})
    assert set(told.results) <= {"ready", "list-x"}
    assert not told.is_ok("list-x") or told.data
    assert report.parse(text).is_ok("list-x")


def test_what_is_no_report_is_passed_over() -> None:
    """Noise before, between and behind."""
    told = report.parse(b"\0\xffnoise\n@ \n@@ mount ok\n@ UP ok\n@ ready ok\n@ data x y\nend")

    assert told.results == {"ready": "ok"}


def test_a_step_that_never_ended_is_a_crash_of_linux() -> None:
    """Started, not reached, and failed are told apart."""
    told = report.parse(b"@ ready ok\n@ work failed: no space\n@ mount started\n")

    assert told.problem("ready") is None
    assert told.problem("mount") == "mount: Linux hung or crashed here"
    assert told.problem("work") == "work failed: no space"
    assert told.problem("unmount") == "unmount was not reached (last step: mount: started)"


BAD_KERNEL_LINES = (
    "[   3.1] OCFS2: ERROR (device vda): ocfs2_validate_inode_block: Invalid dinode #12",
    "[   3.1] (mount,95,0):ocfs2_replay_journal:1668 ERROR: status = -30",
    "[   3.1] (kworker/u2:1,35,0):ocfs2_recover_node:1781 ERROR: status = -5",
    "[   3.1] File system is now read-only due to the potential of on-disk corruption.",
    "[   3.1] kernel BUG at fs/jbd2/journal.c:123!",
    "[   3.1] JBD2: journal checksum error",
    "[   3.1] JBD2: Error -5 detected when updating journal superblock",
    "[   3.1] Kernel panic - not syncing: OCFS2: (device vda): panic forced after error",
    "[   3.1] blk_update_request: I/O error, dev vda, sector 9",
)
GOOD_KERNEL_LINES = (
    '[   3.1] ocfs2: Error -2 running user helper "/sbin/ocfs2_hb_ctl -K -u 91E6"',
    "[   3.1] ocfs2: Begin replay journal (node 1, slot 0) on device (254,0)",
    "[   3.1] ocfs2: File system on device (254,0) was not unmounted cleanly, recovering it.",
    "[   3.1] o2dlm: Leaving domain 91E6DE1FE3FF49A0991185F15911CAB3",
    "[   3.1] EXT4-fs: debug",
)


def test_trouble_in_the_kernel_log_is_told_from_news() -> None:
    """Messages as Linux writes them."""
    console = "\r\n".join((*BAD_KERNEL_LINES, *GOOD_KERNEL_LINES)).encode()

    assert report.kernel_lines(console, report.KERNEL_TROUBLE) == list(BAD_KERNEL_LINES)


# ---- listings ----


def listed(names: list[bytes], stats: bytes, sums: bytes, links: bytes = b"") -> report.Report:
    """A report with a listing of files."""
    told = report.Report()
    ended = b"".join(name + b"\0" for name in names)
    told.data = {"x-names": b".\0" + ended, "x-files": ended, "x-links": b"", "x-targets": links}
    told.data |= {"x-stats": b"41ed 0 0 3 4096 5 .\n" + stats, "x-sums": sums}
    return told


def test_a_listing_takes_any_name() -> None:
    """Newlines, and names that look like lines of the listing, are still names."""
    sums = [hashlib.sha256(bytes([number])).hexdigest() for number in range(3)]
    names = [b"./a\nb", b"./81a4 0 0 1 1 5 ./z", b"./\xff\n" + sums[0].encode() + b"  ./z"]
    stats = b"".join(b"81a4 0 0 %d 7 5 %s\n" % (n + 1, name) for n, name in enumerate(names))
    lines = b"".join(
        each.encode() + b"  " + name + b"\n" for each, name in zip(sums, names, strict=True)
    )

    found = tree.from_report(listed(names, stats, lines), "x")

    assert found == {b"": Entry(0o40755, 3, 0, "", 5)} | {
        name[2:]: Entry(0o100644, n + 1, 7, sums[n], 5) for n, name in enumerate(names)
    }


def test_what_linux_could_not_read_is_told() -> None:
    """A missing line is that entry's, and moves no other one."""
    names = [b"./one", b"./two", b"./three"]
    stats = b"81a4 0 0 1 7 5 ./one\n81a4 0 0 1 7 5 ./two\n"
    sums = b"%s  ./one\n%s  ./three\n" % (b"1" * 64, b"3" * 64)

    found = tree.from_report(listed(names, stats, sums), "x")

    assert found[b"one"].content == "1" * 64
    assert found[b"two"].content == tree.UNREADABLE
    assert found[b"three"].content == "3" * 64
    assert tree.unreadable(found) == ["b'two' can't be read", "b'three' can't be read"]


def test_differences_of_trees() -> None:
    """Missing, changed and unexpected entries; the root and lost+found are nobody's business."""
    same = Entry(0o100644, 1, 3, "abc")
    wanted = {b"": Entry(0o40755, 3, 0, ""), b"a": same, b"b": same, b"lost+found": same}
    found = {b"": Entry(0o40755, 9, 0, ""), b"b": Entry(0o100644, 2, 3, "abc"), b"c": same}

    lines = tree.compare(wanted, found)

    assert [line[:4] for line in lines] == ["b'a'", "b'b'", "b'c'"]
    assert "missing" in lines[0] and "2 links" in lines[1] and "instead of nothing" in lines[2]
    assert tree.compare(wanted, dict(wanted)) == []
    assert len(tree.compare({b"%d" % n: same for n in range(99)}, {})) == 11
    assert tree.from_json(tree.to_json(wanted)) == wanted


def test_times_are_compared_where_both_are_known() -> None:
    """What Linux wrote as it went is not known to the second."""
    then, later, unknown = (Entry(0o100644, 1, 3, "abc", mtime_s) for mtime_s in (5, 6, -1))

    assert tree.compare({b"a": then}, {b"a": unknown}) == []
    assert tree.compare({b"a": unknown}, {b"a": later}) == []
    assert len(tree.compare({b"a": then}, {b"a": later})) == 1
    assert len(tree.compare({b"a": unknown}, {b"a": Entry(0o100644, 1, 3, "abd", 5)})) == 1


# ---- what ocfs2-tools say ----

FSCK_CLEAN = """\
Checking OCFS2 filesystem in o.img:
  Label:              a label
  UUID:               91E6DE1FE3FF49A0991185F15911CAB3
  Number of blocks:   16384
  Block size:         4096
  Number of clusters: 16384
  Cluster size:       4096
  Number of slots:    2

** Skipping slot recovery because -n was given. **
o.img was run with -f, check forced.
Pass 0a: Checking cluster allocation chains
Pass 1: Checking inodes and blocks
Pass 4b: Checking inodes link counts
All passes succeeded.
fsck.ocfs2 1.8.7
"""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text, None),
        (
            lambda text: text.replace("Pass 4b", "[GROUP_BIT] bit 7 is set. Clear it? n\nPass 4b"),
            "[GROUP_BIT]",
        ),
        (
            lambda text: text.replace("o.img was", "** Skipping journal replay because -n was\n"),
            "** Skipping journal",
        ),
        (lambda text: text.replace("All passes succeeded.", ""), "did not finish"),
        (lambda text: "", "did not finish"),
        (lambda text: "fsck.ocfs2: Bad magic number in superblock", "fsck.ocfs2: Bad magic"),
    ],
)
def test_fsck_is_judged_by_what_it_prints(
    change: Callable[[str], str], complaint: str | None
) -> None:
    """It says that all passes succeeded also when it found damage."""
    found = volume.fsck_complaints(change(FSCK_CLEAN))

    if complaint is None:
        assert found == []
    else:
        assert found and complaint in found[0]


STATS = """\
\tRevision: 0.90
\tRoot Blknum: 5   System Dir Blknum: 6
\tBlock Size Bits: 12   Cluster Size Bits: 12
\tMax Node Slots: 4
\tLabel: UUID: 00000000000000000000000000000000
\tUUID: 91E6DE1FE3FF49A0991185F15911CAB3
\tCluster stack: classic o2cb
"""
HEARTBEAT = """\
\tTree Depth: 0   Count: 243   Next Free Rec: 1
\t## Offset        Clusters       Block#          Flags
\t0  0             256            275             0x0
"""


def test_a_volume_is_known_by_its_superblock() -> None:
    """The label, which is free text, is not taken for anything else."""
    found = volume.parse_volume(STATS, HEARTBEAT)

    assert found.uuid == "91E6DE1FE3FF49A0991185F15911CAB3"
    assert (found.slots, found.heartbeat_sector) == (4, 275 * 8)


@pytest.mark.parametrize(
    ("stats", "heartbeat"),
    [
        ("debugfs.ocfs2: Bad magic number in inode", HEARTBEAT),
        ("", HEARTBEAT),
        (STATS, "stat: File not found"),
    ],
)
def test_what_is_no_volume_is_said(stats: str, heartbeat: str) -> None:
    """Damage of the superblock is a verdict, not a check that can't run."""
    with pytest.raises(NotOcfs2):
        volume.parse_volume(stats, heartbeat)


def test_slot_map_of_debugfs() -> None:
    """Free slots are not listed."""
    assert volume.parse_slot_map("\tSlot#   Node#\n\t    0       3\n\t    2       0\n") == {
        0: 3,
        2: 0,
    }
    assert volume.parse_slot_map("\tSlot#   Node#\n") == {}


# ---- the verdict ----

GOOD_RUN = b"".join(
    (
        b"@ ready ok\n@ heartbeat ok\n@ mount ok\n@ replay ok\n",
        *(data(f"before-{part}", b"") for part in ("files", "links", "sums", "targets")),
        data("before-names", b".\0"),
        data("before-stats", b"41ed 0 0 3 4096 5 .\n"),
        b"@ list-before ok\n@ marker ok\n@ unmount ok\n",
    )
)


def verdict_of(text: bytes, console: bytes = b"", task: Task | None = None) -> list[str]:
    """The complaints about a run."""
    verdict = Verdict()
    task = task or Task(marker="m")
    judge_report(report.parse(text), console, task, replays=1, verdict=verdict)
    return verdict.complaints


def test_a_good_run_is_good() -> None:
    """Everything was reached and nothing was said."""
    assert verdict_of(GOOD_RUN) == []


@pytest.mark.parametrize(
    "step", ["heartbeat", "mount", "replay", "list-before", "marker", "unmount"]
)
@pytest.mark.parametrize("result", ["started", "failed: no", None])
def test_every_step_counts(step: str, result: str | None) -> None:
    """A step that hangs, fails or is not reached makes the run bad, and is named."""
    line = f"@ {step} {result}\n" if result else ""

    complaints = verdict_of(GOOD_RUN.replace(f"@ {step} ok\n".encode(), line.encode()))

    assert len(complaints) == 1 and complaints[0].startswith(step)


def test_a_kernel_that_complains_makes_a_run_bad() -> None:
    """Though every step went well."""
    (complaint,) = verdict_of(GOOD_RUN, console=BAD_KERNEL_LINES[0].encode())

    assert "Invalid dinode #12" in complaint


def test_a_listing_without_a_root_is_bad() -> None:
    """`find` that finds nothing must not pass for an empty volume."""
    text = GOOD_RUN.replace(data("before-names", b".\0"), data("before-names", b""))

    assert verdict_of(text) == ["the listing before the work is empty"]


def test_a_power_cut_needs_no_unmount() -> None:
    """But it must have come so far."""
    task = Task(marker="m", crash=True)

    assert verdict_of(GOOD_RUN.replace(b"@ unmount", b"@ crash"), task=task) == []
    assert len(verdict_of(GOOD_RUN.replace(b"@ unmount ok\n", b""), task=task)) == 1


# ---- the command ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "nothing"],
        ["image", "--expect", "path"],
        ["image", "--expect", "path:ABC"],
        ["image", "--node", "one"],
        ["one", "two"],
    ],
)
def test_a_wrong_call_could_not_run(arguments: list[str]) -> None:
    """Its exit code must not be that of a verdict."""
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)

    assert caught.value.code == ExitCode.INCONCLUSIVE


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "no such file"),
        (["--node", "255"], "node 255"),
        (["--node", "-1"], "node -1"),
        (["--marker", "a/b"], "marker"),
    ],
)
def test_an_image_that_can_not_be_judged_could_not_run(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says why."""
    code = command.main([str(tmp_path / "no image"), *more])

    assert code == ExitCode.INCONCLUSIVE
    assert said in capsys.readouterr().err


def test_missing_programs_are_named_with_their_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them at once."""
    there = {"apt-get", "apt-cache", "dpkg-deb"}
    monkeypatch.setattr(programs, "find_program", lambda name: name if name in there else None)

    assert command.main([]) == ExitCode.INCONCLUSIVE

    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("apt-get install busybox-static kmod ocfs2-tools qemu-system-x86 seabios")


def test_the_exit_code_of_a_campaign(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad check outweighs one that could not run, and neither keeps the others from running."""
    ran = []

    def check(name: str, error: Exception | None) -> Callable[[Story], None]:
        def run(story: Story) -> None:
            ran.append(name)
            if error is not None:
                raise error

        return run

    checks = {
        "good": check("good", None),
        "bad": check("bad", Bad("line one\nline two")),
        "broken": check("broken", OperatorError("no qemu", ExitCode.INCONCLUSIVE)),
        "buggy": check("buggy", KeyError("a bug of the check")),
    }
    monkeypatch.setattr(command, "CHECKS", checks)
    monkeypatch.setattr(command, "CACHE", tmp_path)
    monkeypatch.setattr(command, "need_all", lambda: None)
    monkeypatch.setattr(command, "get_kernel", lambda: kernel.Kernel("6.1", tmp_path))

    def run(*names: str) -> int:
        return command.run_campaign(list(names), 1, keep=False)

    assert run("good") == ExitCode.OK
    assert run("good", "broken") == ExitCode.INCONCLUSIVE
    assert run("broken", "bad", "good") == ExitCode.VIOLATED
    assert run("bad", "broken") == ExitCode.VIOLATED
    assert run("buggy", "good") == ExitCode.INCONCLUSIVE
    assert ran[-2:] == ["buggy", "good"]
    assert ran[:-2] == ["good", "good", "broken", "broken", "bad", "good", "bad", "broken"]
    assert "line two" in capsys.readouterr().out
    assert [path.name.partition("-")[0] for path in (tmp_path / "runs").iterdir()].count(
        "good"
    ) == 0


def test_every_check_is_explained() -> None:
    """In the list at the top of the campaign."""
    text = (TOOLS_VM / "campaign.py").read_text()

    for name, run in CHECKS.items():
        assert f"\n    {name} " in text
        assert run.__doc__
