"""What is wrong is said in one clear line, with a documented exit code, and nothing is started."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.clusters import left_behind, short_folder, tmem, tmem_here
from tests.support.tools import need_tool


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder to run commands in."""
    with short_folder() as path:
        yield path


@pytest.mark.parametrize(
    ("words", "exit_code", "says"),
    [
        (
            ["up", "--topo", "ring"],
            64,
            "no topology 'ring'; there are default, pair, single, shared, demo",
        ),
        (["up", "--topo", "pair,colour=red"], 64, "'colour=red' is no parameter of a topology"),
        (["up", "--topo", "pair,memory=much"], 64, "'much' is no size"),
        (["up", "--topo", "pair,n=some"], 64, "'some' is no whole number"),
        (["up", "--topo", "pair,compress=yes"], 64, "'yes' is no switch (on or off)"),
        (["up", "--topo", "pair,eviction=lru"], 65, "hypervisor.eviction: input should be"),
        (["up", "--topo", "single,group="], 65, "guest[0].group"),
        (["up", "--topo", "single,memory=3000"], 65, "guest[0].memory: 3000 bytes are no whole"),
        (["up", "--topo", "pair,n=0"], 65, "guest: list should have at least 1 item"),
        (["up", "--topo", "pair", "-f", "c.toml"], 64, "a cluster file or a topology, not both"),
        (["up", "-f", "missing.toml"], 66, "missing.toml: No such file"),
        (["up", "--topo", "single,arena=1000T"], 69, "does not fit in /dev/shm"),
        (["up", "-d", "--topo", "single,arena=1000T"], 69, "does not fit in /dev/shm"),
        (["up", "--topo", "single,memory=1000T"], 69, "of memory are available"),
        (["up", "-d", "--topo", "default,n=150"], 69, "150 guests need 300 message queues"),
        (["up", "--topo", "default,n=150"], 69, "150 guests need 300 message queues"),
        (["up", "-d", "--run", "/proc/nowhere"], 65, "choose another with --run"),
        (["up", "--colour"], 64, "No such option: --colour"),
        (["dance"], 64, "No such command 'dance'"),
        (["ps"], 69, "no cluster is running"),
        (["down"], 69, "no cluster is running"),
        (["stats"], 69, "no cluster is running"),
        (["logs"], 69, "no cluster is running"),
        (["exec", "red", "--", "ls"], 69, "no cluster is running"),
        (["list"], 69, "no cluster is running"),
        (["freeze", "--all"], 69, "no cluster is running"),
        (["freeze"], 64, "say whom to freeze"),
        (["auth", "allow", "red", "7"], 64, "'7' is no uuid"),
        (["tmem-list", "-a"], 69, "no cluster is running"),
        (["exec", "red"], 64, "Missing argument"),
    ],
)
def test_bad_command_is_one_line_and_an_exit_code(
    folder: Path, words: list[str], exit_code: int, says: str
) -> None:
    """No traceback, no table, no file, no process."""
    done = tmem_here(*words, cwd=folder)

    (line,) = done.stderr.splitlines()
    assert line.startswith("tmem: ")
    assert says in line
    assert done.returncode == exit_code
    assert done.stdout == ""
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "exit_code"), [(["dance"], 64), (["up", "-f", "missing.toml"], 66), (["ps"], 69)]
)
def test_the_process_ends_with_the_same(folder: Path, words: list[str], exit_code: int) -> None:
    """What the others here ask of the function is what a shell sees."""
    done, here = tmem(*words, cwd=folder), tmem_here(*words, cwd=folder)

    assert done.returncode == here.returncode == exit_code
    assert (done.stdout, done.stderr) == (here.stdout, here.stderr)


def test_all_errors_of_a_cluster_file_are_told_with_their_place(folder: Path) -> None:
    """A wrong type, an unknown key, a bad size, one name twice: four lines."""
    (folder / "bad.toml").write_text(
        'nmae = "typo"\n[hypervisor]\narena = "16Q"\n'
        '[[guest]]\nname = "red"\nmemory = [1]\n[[guest]]\nname = "red"\n'
        '[[phase]]\ntitle = "t"\n[phase.work.green]\nworkload = "mixed"\n'
    )

    done = tmem_here("up", "-f", "bad.toml", cwd=folder)

    places = [line.split(": ")[:3] for line in done.stderr.splitlines()]
    assert sorted(places) == [
        ["tmem", "bad.toml", "guest[0].memory"],
        ["tmem", "bad.toml", "guest[1].name"],
        ["tmem", "bad.toml", "hypervisor.arena"],
        ["tmem", "bad.toml", "nmae"],
        ["tmem", "bad.toml", "phase[0].work.green"],
    ]
    assert done.returncode == 65


@pytest.mark.parametrize("name", ["audit", "hypervisor", "console", "administrator", "red.sock"])
def test_a_guest_has_no_name_that_stands_for_something_else(folder: Path, name: str) -> None:
    """Its log would be the audit log, or the hypervisor's; its socket on the way that of red."""
    (folder / "bad.toml").write_text(f'[[guest]]\nname = "red"\n[[guest]]\nname = "{name}"\n')

    done = tmem_here("up", "-f", "bad.toml", cwd=folder)

    assert f"guest[1].name: '{name}' is the name of something else" in done.stderr
    assert done.returncode == 65


def test_settings_that_do_not_fit_are_told_with_the_rest(folder: Path) -> None:
    """Reserves above the arena or the cap, unknown names, bad uuids, roles twice."""
    (folder / "bad.toml").write_text(
        '[hypervisor]\narena = "4M"\neviction = "lru"\nscheduling = "random"\nfaults_max = -1\n'
        '[[guest]]\nname = "red"\ncount = 2\nreserve = "2M"\ncap = "1M"\nweight = -1\n'
        '[[guest]]\nname = "blue"\nreserve = "1M"\ncap = "1000"\npriority = "urgent"\n'
        'compress = "yes"\nsharing = "group"\n'
        '[[shared_pool]]\nuuid = "abc"\nwriters = ["green"]\n'
        '[[shared_pool]]\nuuid = "abcdef01-2345-6789-1234-567890abcdef"\n'
        'writers = ["blue"]\nreaders = ["red1", "blue"]\n'
        '[[shared_pool]]\nuuid = "abcdef0123456789-1234567890abcdef"\n'
        '[[shared_pool]]\nuuid = "ABCDEF01234567891234567890ABCDEF"\n'
    )

    done = tmem_here("up", "-f", "bad.toml", cwd=folder)

    complaints = dict(line.split(": ", 3)[2:] for line in done.stderr.splitlines())
    assert sorted(complaints) == [
        "guest",
        "guest[0].reserve",
        "guest[0].weight",
        "guest[1].cap",
        "guest[1].compress",
        "guest[1].priority",
        "guest[1].reserve",
        "guest[1].sharing",
        "hypervisor.eviction",
        "hypervisor.faults_max",
        "hypervisor.scheduling",
        "shared_pool[0].uuid",
        "shared_pool[0].writers",
        "shared_pool[1].readers",
        "shared_pool[2].uuid",
        "shared_pool[3].uuid",
    ]
    assert complaints["guest"] == ("all reserves together are 5.0 MiB and the arena has 4.0 MiB")
    assert "green" in complaints["shared_pool[0].writers"]
    assert "there are red1, red2, blue" in complaints["shared_pool[0].writers"]
    assert "shared_pool[1] has it already" in complaints["shared_pool[3].uuid"]
    assert done.returncode == 65


def _missing(path: Path) -> None:
    del path


def _not_ext(path: Path) -> None:
    path.write_bytes(b"GIF89a" * 200_000)


def _ext4(path: Path) -> None:
    path.write_bytes(bytes(8 * 2**20))
    subprocess.run([need_tool("mke2fs"), "-q", "-t", "ext4", "-b", "4096", path], check=True)


def _truncated(path: Path) -> None:
    path.write_bytes(bytes(8 * 2**20))
    subprocess.run([need_tool("mke2fs"), "-q", "-t", "ext2", "-b", "4096", path], check=True)
    with path.open("r+b") as file:
        file.truncate(4 * 2**20)


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_missing, "no such file"),
        (_not_ext, "not"),
        (_ext4, "extents"),
        (_truncated, "truncated"),
        (_folder, "directory"),
    ],
)
@pytest.mark.parametrize("detach", [["-d"], []], ids=["background", "measured"])
def test_unusable_image_is_refused_by_name(
    folder: Path,
    cluster_name: str,
    spoil: Callable[[Path], None],
    says: str,
    detach: list[str],
) -> None:
    """The guest, the image and what is wrong with it, before any process is started."""
    spoil(folder / "disk.img")
    (folder / "c.toml").write_text(
        f'name = "{cluster_name}"\n[[guest]]\nname = "red"\nimage = "disk.img"\n'
    )

    done = tmem_here("up", *detach, "-f", "c.toml", cwd=folder)

    (line,) = done.stderr.splitlines()
    assert line.startswith("tmem: red: ")
    assert "disk.img" in line
    assert says in line
    assert done.returncode == 66
    assert left_behind(folder, cluster_name) == []


def test_image_of_two_guests_is_refused(folder: Path) -> None:
    """Two kernels on one disk would destroy it."""
    (folder / "c.toml").write_text(
        '[[guest]]\nname = "red"\nimage = "disk.img"\n'
        '[[guest]]\nname = "blue"\nimage = "./disk.img"\n'
    )

    done = tmem_here("up", "-f", "c.toml", cwd=folder)

    (line,) = done.stderr.splitlines()
    assert "guest[1].image" in line
    assert "in use by another guest" in line
    assert done.returncode == 65
