"""A cluster in the background, looked at by the other commands."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ipc.names import process_start
from ipc.segment import SHARED_MEMORY_DIRECTORY
from tests.support.clusters import left_behind, tmem, tmem_here, tmem_process, wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture
def up(folder: Path, cluster_file: Path) -> Iterator[Path]:
    """The folder of a cluster that is up; taken down at the end if the test did not."""
    with _up(folder, cluster_file):
        yield folder


@pytest.fixture(scope="module")
def standing(module_folder: Path, module_cluster_file: Path) -> Iterator[Path]:
    """The same for all tests that leave it as it is."""
    with _up(module_folder, module_cluster_file):
        yield module_folder


@contextmanager
def _up(folder: Path, cluster_file: Path) -> Iterator[None]:
    done = tmem("up", "-d", "-f", str(cluster_file), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "red, blue" in done.stdout
    try:
        yield
    finally:
        tmem("down", cwd=folder)


def test_commands_see_a_cluster_in_the_background(up: Path, cluster_name: str) -> None:
    """ps, exec, stats, logs and down work on the newest live run without being told which."""
    rows = json.loads(tmem("ps", "--json", cwd=up).stdout)
    assert [row["name"] for row in rows] == ["supervisor", "hypervisor", "red", "blue"]
    assert [row["state"] for row in rows] == ["running", "running", "idle", "idle"]

    source = next(path for path in sorted((up / "tree").rglob("*.bin")) if path.stat().st_size > 9)
    inside = f"/{source.relative_to(up / 'tree')}"
    digest = tmem("exec", "red", "--", "sha256sum", inside, cwd=up)
    assert digest.stdout.split() == [hashlib.sha256(source.read_bytes()).hexdigest(), inside]

    missing = tmem("exec", "red", "--", "cat", "/no/such", cwd=up)
    assert missing.returncode == 1
    assert "No such file or directory" in missing.stderr

    stats = json.loads(tmem("stats", "--json", cwd=up).stdout)
    assert set(stats["guests"]) == {"red", "blue"}
    assert stats["guests"]["red"]["counters"]["disk_reads_pages"] > 0
    assert stats["hypervisor"]["generation"] == 1
    table = tmem("stats", cwd=up).stdout
    assert table.splitlines()[0].split()[:3] == ["NAME", "STATE", "MEM"]

    logs = tmem("logs", "red", cwd=up).stdout
    assert "red | " in logs
    assert "event=start" in logs

    assert tmem("down", cwd=up).returncode == 0
    assert left_behind(up, cluster_name) == []
    again = tmem("ps", cwd=up)
    assert again.returncode == 69
    assert "no cluster is running" in again.stderr
    # Logs outlive their cluster.
    assert "event=stop" in tmem("logs", "hypervisor", cwd=up).stdout


def test_cluster_ends_with_its_run_directory(up: Path, cluster_name: str) -> None:
    """Nobody could find it any more to take it down, nor what it has in memory."""
    pids = [row["pid"] for row in json.loads(tmem("ps", "--json", cwd=up).stdout)]
    shutil.rmtree(up / "runs")
    wait_until(lambda: all(process_start(pid) is None for pid in pids), "its processes end")
    assert [path for path in SHARED_MEMORY_DIRECTORY.iterdir() if cluster_name in path.name] == []


def test_guest_process_has_nothing_of_the_rooms_above(standing: Path) -> None:
    """The fork server imports neither our command line nor the hypervisor into a guest."""
    modules = tmem_here("exec", "red", "--", "modules", cwd=standing).stdout.split()

    rooms = {name.partition(".")[0] for name in modules}
    assert {"guests", "fs", "ipc"} <= rooms
    assert not rooms & {"tools", "hypervisor", "typer", "rich", "pydantic"}


def test_followed_logs_end_with_the_cluster(up: Path) -> None:
    """`logs -f` prints what is written meanwhile and ends when the cluster is down."""
    with tmem_process("logs", "-f", "red", cwd=up) as following:
        assert tmem("down", cwd=up).returncode == 0
        output, errors = following.communicate(timeout=20)

    assert "event=stop" in output
    assert errors == ""


def test_unknown_guest_is_refused_by_name(standing: Path) -> None:
    """Both commands name what there is; nothing happens to the cluster."""
    for words in (["exec", "green", "--", "ls"], ["logs", "green"]):
        done = tmem_here(*words, cwd=standing)

        assert done.returncode == 64
        assert "'green'" in done.stderr
        assert "red" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_image_of_a_running_guest_is_refused_to_another_cluster(
    standing: Path, cluster_name: str
) -> None:
    """Two kernels on one disk would destroy it; the second cluster does not start."""
    (image,) = standing.glob("runs/*/on/images/red.img")
    (standing / "second.toml").write_text(
        f'name = "{cluster_name}"\n[hypervisor]\narena = "2M"\n'
        f'[[guest]]\nname = "thief"\nimage = "{image}"\n'
    )

    done = tmem_here("up", "-d", "-f", "second.toml", "--run", "second", cwd=standing)

    assert done.returncode == 66
    (line,) = done.stderr.splitlines()
    assert line.startswith("tmem: thief: ")
    assert "in use" in line
    assert not list((standing / "second").rglob("registry/*"))


def test_run_directory_of_a_live_cluster_is_refused(
    standing: Path, module_cluster_file: Path
) -> None:
    """A second cluster does not move in with the first, which goes on."""
    (run,) = (path for path in (standing / "runs").iterdir() if path.name[0].isdigit())

    for words in (["-d"], []):
        done = tmem_here(
            "up", *words, "-f", str(module_cluster_file), "--run", str(run), cwd=standing
        )

        assert done.returncode == 65
        assert "is running in" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert tmem_here("exec", "red", "ls", cwd=standing).returncode == 0


def test_folder_with_a_long_path_is_no_obstacle(folder: Path, cluster_file: Path) -> None:
    """Sockets can't have long paths; a short way in is made, and removed with the cluster."""
    deep = folder / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)

    assert tmem("up", "-d", "-f", str(cluster_file), cwd=deep).returncode == 0
    (door,) = (Path(path.read_text()) for path in deep.rglob("door"))
    assert door.is_symlink()
    assert tmem("exec", "red", "--", "ls", "/", cwd=deep).returncode == 0
    assert json.loads(tmem("stats", "--json", cwd=deep).stdout)["hypervisor"] is not None
    assert tmem("down", cwd=deep).returncode == 0
    assert not door.is_symlink()
