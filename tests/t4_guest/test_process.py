"""A guest as a real process: boot, control socket, the end, and what the kernel says of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fs.block.file import FileDevice
from guests.boot import GuestSpec
from guests.control import socket_path
from guests.shell import STDOUT_BYTES_MAX
from ipc.errors import ExitCode
from tests.support.hypervisors import running_hypervisor
from tests.support.tools import need_tool
from tests.t4_guest.processes import GuestProcess, read_io, running_guest
from tests.t4_guest.worlds import PAGE, assert_clean, make_image

MEMORY_BYTES = 1 << 20


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of about 3 MB: several times the guest's memory."""
    rng = random.Random(8)
    top = tmp_path / "tree"
    for folder in ("", "a", "a/b", "c"):
        (top / folder).mkdir(parents=True, exist_ok=True)
        for number in range(12):
            (top / folder / f"f{number}").write_bytes(rng.randbytes(rng.randrange(120_000)))
    (top / "module.py").write_text("class Page:\n    pass\n" * 500)
    (top / "broken.py").write_text("def f(:\n")
    return top


@pytest.fixture
def manifest(tmp_path: Path, tree: Path) -> Path:
    """Hashes of the tree."""
    path = tmp_path / "manifest.json"
    hashes = {
        str(file.relative_to(tree)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in tree.rglob("*")
        if file.is_file()
    }
    path.write_text(json.dumps(hashes))
    return path


@pytest.fixture
def spec(tmp_path: Path, tree: Path) -> GuestSpec:
    """A guest without tmem over an image of the tree."""
    image = make_image(tmp_path / "image", tree=tree)
    run_directory = tmp_path / "run"
    run_directory.mkdir()
    return GuestSpec("g1", image, MEMORY_BYTES, run_directory, attach=False)


def test_boot_exec_stop_leaves_a_clean_image(spec: GuestSpec, tree: Path) -> None:
    """The shortest life of a guest."""
    with running_guest(spec) as guest:
        assert guest.exec("cat", "/a/f3") == (tree / "a" / "f3").read_bytes()
        assert guest.exec("ls", "/a").split()[:2] == [b"b", b"f0"]
        assert stat.S_IMODE(guest.path.stat().st_mode) == 0o600

        assert guest.stop() == 0
        assert not guest.path.exists()
    assert_clean(spec.image)
    assert "event=start" in guest.log()
    assert "event=stop" in guest.log()


def test_process_id_io_agrees_with_the_counting_device(spec: GuestSpec) -> None:
    """Linux's count of bytes read by the process equals ours times 4 KiB, exactly.

    Between the two readings the guest only reads files of its image for `exec`: its control socket
    is served by recv(2), which `rchar` leaves out, its log is only written, and /proc/PID/io is
    read here and not in the guest (the status, which reads it there, is asked for outside).
    """
    with running_guest(spec) as guest:
        guest.exec("sha256sum", "/f0")
        before = guest.ask("status")["counters"]
        io_before = read_io(guest.pid)
        for folder in ("", "/a", "/a/b", "/c", ""):
            guest.exec("sha256sum", *(f"{folder}/f{number}" for number in range(12)))
        io_after = read_io(guest.pid)
        after = guest.ask("status")["counters"]
        guest.stop()

    pages = after["disk_reads_pages"] - before["disk_reads_pages"]
    assert pages > 700, "much more than the memory holds was read"
    assert io_after["rchar"] - io_before["rchar"] == pages * PAGE
    calls = after["disk_read_calls"] - before["disk_read_calls"]
    assert io_after["syscr"] - io_before["syscr"] == calls


def test_written_pages_agree_with_what_the_kernel_counted(spec: GuestSpec) -> None:
    """The same for writes.  Nothing is logged and no reply is written by write(2) meanwhile."""
    with running_guest(spec) as guest:
        guest.exec("sync")
        before = guest.ask("status")["counters"]
        io_before = read_io(guest.pid)
        guest.exec("cp", "/a/f1", "/copy")
        guest.exec("sync")
        io_after = read_io(guest.pid)
        after = guest.ask("status")["counters"]
        guest.stop()

    pages = after["disk_writes_pages"] - before["disk_writes_pages"]
    assert pages > 0
    assert io_after["wchar"] - io_before["wchar"] == pages * PAGE


def test_guest_imports_nothing_of_tools(spec: GuestSpec) -> None:
    """Nor what only tools may import, nor the hypervisor."""
    with running_guest(spec) as guest:
        modules = set(guest.exec("modules").decode().split())
        guest.stop()

    tops = {name.partition(".")[0] for name in modules}
    assert {"guests", "fs", "ipc"} <= tops
    assert tops.isdisjoint({"tools", "hypervisor", "typer", "rich", "pydantic", "lz4", "xxhash"})


def test_workloads_verify_everything(spec: GuestSpec, manifest: Path, tree: Path) -> None:
    """Every file, every byte; and the log that was written."""
    sizes = [file.stat().st_size for file in tree.rglob("*") if file.is_file()]
    with running_guest(spec) as guest:
        guest.work("read_all", manifest=str(manifest))
        status = guest.finish()
        assert (status["state"], status["workload"]) == ("idle", "read_all")
        assert status["done"] == status["total"] == len(sizes)
        assert status["counters"]["files_verified"] == len(sizes)
        assert status["counters"]["bytes_verified"] == sum(sizes)

        guest.work("search", manifest=str(manifest), pattern="^class Page")
        assert guest.finish()["counters"]["matches"] == 1
        guest.work("search", manifest=str(manifest), pattern="(?m)^class Page")
        assert guest.finish()["counters"]["matches"] == 501
        guest.work("compile", manifest=str(manifest))
        counters = guest.finish()["counters"]
        assert (counters["compiled_files"], counters["uncompilable_files"]) == (1, 1)
        guest.work("log", lines=3000, rotate_bytes=40_000, keep=3)
        assert guest.finish()["counters"]["log_lines"] == 3000
        assert guest.exec("ls", "/log").split() == [b"current", b"log.1", b"log.2", b"log.3"]
        guest.work("mixed", manifest=str(manifest), passes=2, zipf=0.8, paths_fraction=0.5)
        status = guest.finish()
        assert status["state"] == "idle", status
        assert status["counters"]["mismatches"] == 0
        assert guest.stop() == 0
    assert_clean(spec.image)


def test_same_seed_same_work(spec: GuestSpec, manifest: Path) -> None:
    """Two runs read the same pages."""
    counts = []
    for _ in range(2):
        with running_guest(spec) as guest:
            guest.work("mixed", seed=5, manifest=str(manifest), passes=2, zipf=1.0, log_lines=0)
            counters = guest.finish()["counters"]
            counts.append((counters["disk_reads_pages"], counters["bytes_verified"]))
            guest.stop()

    assert counts[0] == counts[1]


def test_wrong_content_is_counted_and_named(spec: GuestSpec, manifest: Path) -> None:
    """A byte changed on the disk, and a file that is not there."""
    hashes = json.loads(manifest.read_text())
    hashes["a/gone"] = "0" * 64
    manifest.write_text(json.dumps(hashes))
    subprocess.run(
        [need_tool("debugfs"), "-w", "-R", "rm /c/f0", str(spec.image)],
        check=True,
        capture_output=True,
    )
    with running_guest(spec) as guest:
        guest.exec("cp", "/f1", "/f2")
        guest.work("read_all", manifest=str(manifest))
        status = guest.finish()
        guest.stop()

    assert status["state"] == "idle"
    assert status["counters"]["mismatches"] == 3
    assert status["counters"]["mismatch_paths"] == [
        "/a/gone (No such file or directory)",
        "/c/f0 (No such file or directory)",
        "/f2",
    ]


def test_work_that_can_not_be_begun_is_an_error(spec: GuestSpec, manifest: Path) -> None:
    """The reason comes back at once and the guest stays idle."""
    requests: list[tuple[dict[str, object], str]] = [
        ({"workload": "dance"}, "no workload 'dance'"),
        ({"workload": "read_all"}, "manifest is missing"),
        ({"workload": "read_all", "parameters": {"manifest": "/nowhere"}}, "/nowhere"),
        ({"workload": "log", "parameters": {"lines": "many"}}, "lines must be a number"),
        (
            {"workload": "search", "parameters": {"manifest": str(manifest), "pattern": "("}},
            "pattern",
        ),
        ({"workload": 7}, "workload (text)"),
        ({"workload": "log", "parameters": [1]}, "must be a map"),
    ]
    with running_guest(spec) as guest:
        for request, text in requests:
            assert text in guest.ask("run", **request)["error"]
        assert guest.ask("status")["state"] == "idle"
        assert "no verb" in guest.ask("fly")["error"]
        assert "argv" in guest.ask("exec", argv="ls")["error"]

        guest.work("log", lines=10_000_000)
        assert "running already" in guest.ask("run", workload="log")["error"]
        assert guest.stop() == 0
    assert_clean(spec.image)


def test_full_disk_fails_the_work_and_not_the_guest(spec: GuestSpec) -> None:
    """The status says what happened; other work goes on."""
    with running_guest(spec) as guest:
        guest.work("log", lines=10_000_000, rotate_bytes=1 << 24)
        status = guest.finish()
        assert status["state"] == "failed"
        assert "No space left on device" in status["error"]
        guest.exec("rm", "-r", "/log")
        guest.work("log", lines=100)
        assert guest.finish()["state"] == "idle"
        assert guest.stop() == 0
    assert_clean(spec.image)


def test_histories_of_more_pages_than_prepared_fail_the_work_alone(
    spec: GuestSpec, tmp_path: Path
) -> None:
    """One line names file and page; with as many as there are it works."""
    record = str(tmp_path / "record")
    with running_guest(spec) as guest:
        guest.work("histories", record=record, prepare=1, pages=2, operations=0)
        assert guest.finish()["state"] == "idle"
        guest.work("histories", record=record, pages=3, operations=1000, writes=0.0)
        status = guest.finish()
        assert status["state"] == "failed"
        assert re.fullmatch(
            r".*/histories/\d was prepared without page 2; pages is too many", status["error"]
        )
        guest.work("histories", record=record, pages=2, operations=20)
        assert guest.finish()["error"] is None
        assert guest.stop() == 0
    assert_clean(spec.image)


def test_guest_is_answering_while_it_works(spec: GuestSpec) -> None:
    """The control socket is looked at between two steps."""
    with running_guest(spec) as guest:
        guest.work("log", lines=1_000_000, rotate_bytes=50_000)
        done = [guest.ask("status")["done"] for _ in range(5)]
        assert guest.exec("cat", "/proc/meminfo").startswith(b"MemTotal:           1024 kB")
        assert sorted(done) == done
        assert guest.ask("status")["state"] == "running"
        assert guest.stop() == 0
    assert_clean(spec.image)


def test_half_a_frame_garbage_and_a_deaf_peer_hold_nobody_up(spec: GuestSpec) -> None:
    """Each costs its own connection only."""
    request = b"\x82\xa4verb\xa4exec\xa4argv\x92\xa3cat\xa3/f1"
    with (
        running_guest(spec) as guest,
        socket.socket(socket.AF_UNIX) as half,
        socket.socket(socket.AF_UNIX) as garbage,
        socket.socket(socket.AF_UNIX) as deaf,
    ):
        guest.exec("cp", "/a/b/f2", "/f1")
        for peer in (half, garbage, deaf):
            peer.settimeout(10)
            peer.connect(str(guest.path))
        half.send(struct.pack("<I", 100) + b"x")
        garbage.send(struct.pack("<I", 3) + b"\xc1\xc1\xc1")
        assert garbage.recv(1) == b"", "dropped"
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            _ask_without_listening(guest, deaf, struct.pack("<I", len(request)) + request)
        assert guest.stop() == 0


def _ask_without_listening(guest: GuestProcess, deaf: socket.socket, frame: bytes) -> None:
    for _ in range(1000):
        deaf.sendall(frame)
        assert guest.ask("status")["state"] == "idle"


def test_long_output_is_cut_and_said_so(tmp_path: Path) -> None:
    """An answer fits into a frame."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "big").write_bytes(bytes(STDOUT_BYTES_MAX + 1))
    (tmp_path / "run").mkdir()
    image = make_image(tmp_path / "image", tree=tree)
    with running_guest(GuestSpec("g1", image, MEMORY_BYTES, tmp_path / "run", attach=False)) as g:
        answer = g.ask("exec", argv=["cat", "/big"])
        assert len(answer["stdout"]) == STDOUT_BYTES_MAX
        assert answer["exit_code"] == 1
        assert answer["stderr"] == f"cat: output cut at {STDOUT_BYTES_MAX} bytes\n".encode()
        assert g.stop() == 0


def test_bad_image_is_one_line_and_exit_code_66(spec: GuestSpec) -> None:
    """In the log and in the start-up report."""
    spec.image.write_bytes(os.urandom(64 * PAGE))
    with running_guest(spec) as guest:
        assert guest.join() == ExitCode.NO_INPUT
        report = (spec.run_directory / "guest-g1.error").read_text()
        assert report.count("\n") == 1
        assert str(spec.image) in report
        assert report.strip() in guest.log()
        assert "Traceback" not in guest.log()


def test_image_in_use_is_refused(spec: GuestSpec) -> None:
    """Two guests never mount one image."""
    device = FileDevice(spec.image)
    try:
        with running_guest(spec) as guest:
            assert guest.join() == ExitCode.NO_INPUT
            assert "in use" in (spec.run_directory / "guest-g1.error").read_text()
    finally:
        device.close()


def test_sigterm_ends_it_in_order(spec: GuestSpec) -> None:
    """Also in the middle of work; SIGINT is the supervisor's business."""
    with running_guest(spec) as guest:
        guest.work("log", lines=10_000_000, rotate_bytes=50_000)
        os.kill(guest.pid, signal.SIGINT)
        assert guest.ask("status")["state"] == "running"
        os.kill(guest.pid, signal.SIGTERM)
        assert guest.join() == 0
    assert_clean(spec.image)


def test_guest_ends_with_its_supervisor(spec: GuestSpec) -> None:
    """The supervisor is killed; the guest stops in order by itself."""
    supervisor = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        fields = {**vars(spec), "supervisor_pid": supervisor.pid}
        with running_guest(GuestSpec(**fields)) as guest:
            assert guest.ask("status")["state"] == "idle"
            supervisor.kill()
            assert guest.join() == 0
            assert "the supervisor is gone" in guest.log()
    finally:
        supervisor.kill()
        supervisor.communicate()
    assert_clean(spec.image)


@pytest.mark.cluster
def test_hypervisor_is_killed_under_work_and_comes_back(
    spec: GuestSpec, manifest: Path, cluster_name: str
) -> None:
    """Nothing is ever read wrong; tmem is picked up again; the figures agree before the end."""
    with running_hypervisor(cluster_name, spec.run_directory) as hypervisor:
        fields = {**vars(spec), "attach": True, "token": hypervisor.enrol("g1")}
        with running_guest(GuestSpec(**fields)) as guest:
            # More than it will ever finish: without tmem it is quick, and it must not run dry.
            guest.work("mixed", manifest=str(manifest), passes=1000, zipf=0.5)
            for _ in range(2):
                _wait_for_hits(guest)
                hypervisor.kill()
                time.sleep(0.2)
                assert guest.ask("status")["state"] == "running"
                hypervisor.start()
            _wait_for_hits(guest)
            counters = guest.ask("status")["counters"]
            assert counters["files_verified"] > 0
            assert counters["mismatches"] == 0
            assert counters["cleancache"]["reattaches"] >= 2
            assert guest.stop() == 0
        assert hypervisor.ask("stats")["guests"] == {}
        hypervisor.stop()
    assert_clean(spec.image)


def _wait_for_hits(guest: GuestProcess) -> None:
    """Until tmem is used again."""
    hits = guest.ask("status")["counters"]["cleancache"]["succ_gets"]
    deadline = time.monotonic() + 20
    while guest.ask("status")["counters"]["cleancache"]["succ_gets"] <= hits + 50:
        assert time.monotonic() < deadline, "tmem is not picked up again"
        time.sleep(0.02)


@pytest.mark.cluster
def test_counters_of_guest_and_hypervisor_agree(
    spec: GuestSpec, manifest: Path, cluster_name: str
) -> None:
    """Linux's four counters, counted on both sides."""
    with running_hypervisor(cluster_name, spec.run_directory, 1 << 20) as hypervisor:
        fields = {**vars(spec), "attach": True, "token": hypervisor.enrol("g1")}
        with running_guest(GuestSpec(**fields)) as guest:
            guest.work("mixed", manifest=str(manifest), passes=4)
            guest.finish()
            # Of files that were put: about others nothing is said.
            names = guest.exec("ls", "/").decode().split()
            guest.exec("rm", "-r", *(f"/{name}" for name in names if name != "lost+found"))
            ours = guest.ask("status")["counters"]["cleancache"]
            theirs = hypervisor.ask("stats")["guests"]["g1"]["cleancache"]
            assert {name: ours[name] for name in theirs} == theirs
            assert min(theirs.values()) > 0
            for name, value in theirs.items():
                path = f"/sys/kernel/debug/cleancache/{name}"
                assert guest.exec("cat", path) == f"{value}\n".encode()
            assert guest.stop() == 0
        hypervisor.stop()


@pytest.mark.cluster
def test_wrong_token_is_exit_code_69(spec: GuestSpec, cluster_name: str) -> None:
    """One line that says who refused."""
    with running_hypervisor(cluster_name, spec.run_directory) as hypervisor:
        hypervisor.enrol("g1")
        fields = {**vars(spec), "attach": True, "token": os.urandom(32)}
        _wait_for(spec.run_directory / "attach.sock")
        with running_guest(GuestSpec(**fields)) as guest:
            assert guest.join() == ExitCode.UNAVAILABLE
            assert "refused guest g1" in (spec.run_directory / "guest-g1.error").read_text()
        hypervisor.stop()
    assert not socket_path(spec.run_directory, "g1").exists()
    assert_clean(spec.image)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.01)
