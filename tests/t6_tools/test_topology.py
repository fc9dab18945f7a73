"""Topologies and cluster files: what a cluster is made of before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipc.errors import OperatorError
from tools.administer import questions
from tools.config import ClusterConfig, read_config
from tools.demo import Disk, divide_pages, plan_cluster, work_of
from tools.rundir import ClusterDirectory
from tools.topology import build_topology
from tools.units import format_size, parse_size


def test_default_topology_is_four_guests_that_take_turns() -> None:
    """Everybody is hot, and every kind of work is done."""
    config = build_topology("default")

    names = [name for name, _ in config.guests()]
    assert names == ["alpha", "bravo", "carol", "delta"]
    assert build_topology("demo") == config
    phases = list(work_of(config))
    assert {title for title, _ in phases} == {f"{name} is hot" for name in names}
    assert all(set(work) == set(names) for _, work in phases)
    kinds = {workload for _, work in phases for workload, _ in work.values()}
    assert kinds == {"mixed", "search", "compile", "read_all", "log"}


def test_parameters_change_a_topology() -> None:
    """Sizes have binary units."""
    config = build_topology("pair,n=3,memory=2M,arena=1G,seed=9,name=web")

    assert [guest.memory for _, guest in config.guests()] == [2 * 2**20] * 3
    assert (config.hypervisor.arena, config.seed, config.name) == (2**30, 9, "web")
    assert config.total_memory_bytes == 6 * 2**20 + 2**30
    lending = build_topology("pair,n=3,memory=2M,arena=1G,lend=on")
    assert lending.total_memory_bytes == 2**30


@pytest.mark.parametrize("guests", [1, 3, 7])
def test_memory_off_is_exactly_memory_on(tmp_path: Path, guests: int) -> None:
    """An arena that can't be divided evenly loses no page."""
    config = build_topology(f"default,n={guests},memory=2M,arena=5M")
    disks = dict.fromkeys((name for name, _ in config.guests()))
    directory = ClusterDirectory(tmp_path)

    plans = {mode: _plan(config, list(disks), directory, mode) for mode in ("off", "on")}

    assert sum(plans["on"]) + config.hypervisor.arena == sum(plans["off"])
    assert max(plans["off"]) - min(plans["off"]) in (0, 4096)


def _plan(
    config: ClusterConfig, names: list[str], directory: ClusterDirectory, mode: str
) -> list[int]:
    disks = {name: Disk(name, Path("image"), None, copied=True) for name in names}
    return [guest.memory_bytes for guest in plan_cluster(config, disks, directory, mode).guests]


def test_lent_memory_is_counted_once(tmp_path: Path) -> None:
    """The arena is all there is: with tmem RAM comes out of it, without it is divided."""
    path = tmp_path / "c.toml"
    path.write_text('[hypervisor]\narena = "6M"\nlend = true\n[[guest]]\nname = "web"\ncount = 2\n')
    config = read_config(path)

    assert config.total_memory_bytes == 6 * 2**20
    assert config.memory_beside_bytes == 0
    assert config.hypervisor.options() == {"lend": True}
    plans = [_plan(config, ["web1", "web2"], ClusterDirectory(tmp_path), m) for m in ("on", "off")]
    assert plans == [[4 * 2**20] * 2, [3 * 2**20] * 2]


def test_division_loses_no_page() -> None:
    """The first parts take the odd pages."""
    assert divide_pages(10 * 4096, 3) == [4 * 4096, 3 * 4096, 3 * 4096]


def test_cluster_file_is_read_with_paths_relative_to_it(tmp_path: Path) -> None:
    """A file can be used from another folder."""
    (tmp_path / "c.toml").write_text(
        'name = "web"\nseed = 3\n[hypervisor]\narena = "8M"\neviction = "fifo"\n'
        '[[guest]]\nname = "web"\ncount = 2\nmemory = "2M"\ntree = "site"\n'
        '[[guest]]\nname = "db"\nmemory = 4194304\nimage = "db.img"\nmanifest = "db.json"\n'
        '[[phase]]\ntitle = "load"\n[phase.work.web2]\nworkload = "mixed"\npasses = 4\n'
    )

    config = read_config(tmp_path / "c.toml")

    guests = dict(config.guests())
    assert list(guests) == ["web1", "web2", "db"]
    assert guests["web2"].tree == str(tmp_path / "site")
    assert guests["db"].image == str(tmp_path / "db.img")
    assert guests["web1"].memory == 2 * 2**20
    assert config.hypervisor.eviction == "fifo"
    assert list(work_of(config)) == [("load", {"web2": ("mixed", {"passes": 4})})]


def test_settings_and_grants_are_told_before_guests_start(tmp_path: Path) -> None:
    """For every guest of an entry; what the file does not say is not asked for."""
    (tmp_path / "c.toml").write_text(
        '[hypervisor]\nscheduling = "static"\nadmission = false\nfaults_max = 9\n'
        '[[guest]]\nname = "web"\ncount = 2\nweight = 3\ncap = "2M"\ncompress = true\n'
        '[[guest]]\nname = "db"\nreserve = "64K"\npriority = "high"\nsharing = "group"\n'
        'group = "x"\n[[guest]]\nname = "other"\n'
        '[[shared_pool]]\nuuid = "ABCDEF01-2345-6789-1234-567890ABCDEF"\n'
        'writers = ["web1"]\nreaders = ["web2", "db"]\n'
    )

    config = read_config(tmp_path / "c.toml")
    # As it comes to a supervisor in the background.
    config = ClusterConfig.model_validate_json(config.model_dump_json())

    grant = {"verb": "auth", "action": "allow", "uuid": "abcdef01234567891234567890abcdef"}
    web = {"verb": "set", "weight": 3, "cap_bytes": 2 << 20, "compress": True}
    db = {"reserve_bytes": 65536, "priority": "high", "sharing": "group", "group": "x"}
    assert list(questions(config)) == [
        web | {"guest": "web1"},
        web | {"guest": "web2"},
        {"verb": "set", "guest": "db", **db},
        grant | {"guest": "web1", "role": "writer"},
        grant | {"guest": "web2", "role": "reader"},
        grant | {"guest": "db", "role": "reader"},
    ]
    assert config.hypervisor.options() == {
        "scheduling": "static",
        "admission": False,
        "faults_max": 9,
    }


def test_topologies_have_settings_too() -> None:
    """The same for all guests."""
    config = build_topology("pair,compress=on,group=web,eviction=s3fifo,scheduling=scheduled")

    settings = {"compress": True, "sharing": "group", "group": "web"}
    assert [guest.settings() for _, guest in config.guests()] == [settings] * 2
    assert (config.hypervisor.eviction, config.hypervisor.scheduling) == ("s3fifo", "scheduled")
    assert list(questions(build_topology("pair"))) == []
    assert build_topology("pair,compress=off").guest[0].settings() == {"compress": False}


@pytest.mark.parametrize("key", ["ksm", "direct"])
def test_how_the_host_treats_a_guest_reaches_its_plan(tmp_path: Path, key: str) -> None:
    """From the topology to what is started."""
    for text, expected in ((f"pair,{key}=on", True), ("pair", False)):
        config = build_topology(text)
        disks = {name: Disk(name, Path("image"), None, copied=True) for name, _ in config.guests()}
        plan = plan_cluster(config, disks, ClusterDirectory(tmp_path), "on")
        assert [getattr(guest, key) for guest in plan.guests] == [expected] * 2


def test_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    """With the line and column that the parser found."""
    (tmp_path / "c.toml").write_text("name = \n")

    with pytest.raises(OperatorError, match=r"c.toml is no TOML file: .*line 1"):
        read_config(tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("4k", 4096), ("64M", 2**26), ("2 GiB", 2**31), (12, 12)],
)
def test_sizes_have_binary_units(text: str | int, size: int) -> None:
    """With or without a unit, as number or as text."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5M", "4 MB/s", "16Q", -4096, True, None, [1]])
def test_what_is_no_size_is_refused(text: object) -> None:
    """A cluster file may hold anything."""
    with pytest.raises(ValueError, match="size"):
        parse_size(text)  # type: ignore[arg-type]


def test_sizes_are_printed_with_binary_units() -> None:
    """One digit after the point from KiB on."""
    assert [format_size(size) for size in (0, 1023, 4096, 3 * 2**20 // 2, 2**40)] == [
        "0 B",
        "1023 B",
        "4.0 KiB",
        "1.5 MiB",
        "1.0 TiB",
    ]
