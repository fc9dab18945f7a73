"""Run directories: how a cluster is found, and what a dead one leaves."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.errors import ExitCode, OperatorError
from ipc.names import Registry, process_start
from tests.support.clusters import environment, short_folder, tmem_here, wait_until
from tools.rundir import (
    ClusterDirectory,
    ClusterRecord,
    GuestRecord,
    children_of,
    find_live,
    new_run,
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    with short_folder() as path:
        yield path


def record(pid: int, start: int) -> ClusterRecord:
    """A cluster of one guest, supervised by a process."""
    return ClusterRecord("c", 4096, [GuestRecord("red", 4096, "red.img", None)], pid, start)


def ours() -> ClusterRecord:
    """A cluster that lives: this process supervises it."""
    start = process_start(os.getpid())
    assert start is not None
    return record(os.getpid(), start)


def test_newest_live_run_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --run the newest of ./runs; with it, a run or a cluster's folder."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TMEM_RUN_DIR", raising=False)
    for name, who in (("1", ours()), ("2", ours()), ("3", record(1, 12345))):
        directory = ClusterDirectory(Path("runs") / name / "on")
        directory.make()
        directory.write(who)

    assert find_live(None)[0].path == folder / "runs/2/on"
    assert find_live(Path("runs/1"))[0].path == folder / "runs/1/on"
    assert find_live(Path("runs/1/on"))[1] == ours()
    monkeypatch.setenv("TMEM_RUN_DIR", "runs/1")
    assert find_live(None)[0].path == folder / "runs/1/on"
    with pytest.raises(OperatorError, match="stale run directory"):
        find_live(Path("runs/3"))


def test_process_id_that_was_used_again_is_no_supervisor(folder: Path) -> None:
    """The start time tells them apart; the directory is stale, not live."""
    directory = ClusterDirectory(folder)
    directory.make()
    directory.write(record(os.getpid(), 1))

    assert directory.is_stale()
    with pytest.raises(OperatorError, match="stale run directory"):
        directory.check()


def test_sweep_removes_what_the_registry_names(folder: Path) -> None:
    """A registered process and its child, which nobody had time to register."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)",
        ]
    )
    while not (children := children_of({parent.pid})):
        pass
    directory = ClusterDirectory(folder)
    directory.make()
    Registry(folder).add_process(parent.pid)
    (folder / "attach.sock").touch()

    found = directory.sweep()

    assert len(found) == 2
    assert parent.wait() == -9
    wait_until(lambda: not any(map(process_start, children)), "the end of the child")
    assert not directory.is_stale()
    assert sorted(path.name for path in folder.iterdir()) == ["images", "log", "registry"]
    directory.check()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(folder: Path) -> None:
    """Its registry names a process, and `keys` leads out: root would end the one and empty the
    other."""
    directory = ClusterDirectory(folder / "run")
    directory.make()
    bait = folder / "bait"
    bait.mkdir()
    (bait / "precious").touch()
    (directory.path / "keys").symlink_to(bait)
    child = subprocess.Popen(["sleep", "60"])
    try:
        Registry(directory.path).add_process(child.pid)
        os.chown(directory.path, 54_321, -1)
        for verb in ("clean", "down", "ps"):
            done = tmem_here(verb, "--run", str(directory.path), cwd=folder)

            assert done.returncode == ExitCode.USAGE
            assert "belongs to user 54321" in done.stderr
            assert len(done.stderr.splitlines()) == 1
        with pytest.raises(OperatorError, match="belongs to user"):
            directory.check()
        (folder / "runs").symlink_to(folder)
        assert "0 stale" in tmem_here("clean", cwd=folder).stdout, "it is passed over"
        assert child.poll() is None
        assert (bait / "precious").exists()

        os.chown(directory.path, 0, -1)
        tmem_here("clean", "--run", str(directory.path), cwd=folder)
        assert child.wait() == -9
    finally:
        child.kill()


def test_damaged_record_is_stale_and_not_an_error(folder: Path) -> None:
    """Half a file, or one of another version, is cleaned like any other leftover."""
    directory = ClusterDirectory(folder)
    directory.make()
    for text in ("", "{", "[]", '{"name": 1}', '{"guests": [{"colour": "red"}]}'):
        (folder / "cluster.json").write_text(text)

        assert directory.read() is None
        assert directory.is_stale()
    directory.sweep()
    assert not directory.is_stale()


def test_runs_of_one_second_have_different_names(folder: Path) -> None:
    """Names sort by time."""
    now = datetime.datetime(2026, 11, 23, 10, 0, 0, tzinfo=datetime.UTC)
    names = []
    for _ in range(3):
        path = new_run(folder, now)
        path.mkdir()
        names.append(path.name)

    assert names == ["20261123-100000", "20261123-100000.2", "20261123-100000.3"]
    assert names == sorted(names)


def test_command_line_starts_without_heavy_modules(folder: Path) -> None:
    """`tmem --help` and every completion pays for what is imported at the top."""
    code = "import sys, tools.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    loaded = set(done.stdout.split())
    assert "typer" in loaded
    assert not loaded & {"pydantic", "rich", "multiprocess", "posix_ipc", "guests", "hypervisor"}


def test_long_path_has_a_short_way_in_until_it_is_swept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link is named in the folder before it is made, and only that link is removed."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    directory = ClusterDirectory(folder / ("d" * 90))

    directory.make()
    directory.make()
    (door,) = (path for path in folder.iterdir() if path.is_symlink())

    assert door == directory.door
    assert door.parent == folder
    assert door.readlink() == directory.path
    assert directory.guest_socket("red") == door / "guest-red.sock"
    directory.sweep()
    assert not door.is_symlink()
    assert directory.door == directory.path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
def test_a_short_way_in_of_somebody_else_leads_nowhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was swept away as an old file, and somebody else was quick: elsewhere, or by a link of
    theirs to the right place, which may lead elsewhere tomorrow.  It is not removed either."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    directory = ClusterDirectory(folder / ("d" * 90))
    directory.make()
    door = directory.door
    door.unlink()
    door.symlink_to(folder)
    assert directory.door == directory.path

    door.unlink()
    door.symlink_to(directory.path)
    os.chown(door, 54_321, -1, follow_symlinks=False)
    assert directory.door == directory.path

    directory.sweep()
    assert door.is_symlink()
    directory.make()
    assert directory.door not in (door, directory.path)
    directory.sweep()
