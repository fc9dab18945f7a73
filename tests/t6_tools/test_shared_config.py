"""[[volume]] of a cluster file: each thing that can't be is one clear line with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ipc.errors import OperatorError
from tools.cli import main
from tools.config import validate

GUESTS = [{"name": "red"}, {"name": "blue"}]
VOLUME: dict[str, Any] = {"name": "data", "nodes": ["red", "blue"]}


def complaints(*volumes: dict[str, Any], guests: list[dict[str, Any]] | None = None) -> list[str]:
    """What is said about a cluster with these volumes."""
    fields = {"guest": guests or GUESTS, "volume": list(volumes)}
    try:
        validate(fields, "c.toml")
    except OperatorError as error:
        return str(error).splitlines()
    return []


def test_volume_of_two_guests_is_fine() -> None:
    """And o2cb's timings are what it has."""
    assert complaints(VOLUME) == []
    config = validate({"guest": GUESTS, "volume": [VOLUME]}, "c.toml")
    timing = config.volume[0].timing()
    assert (timing.dead_ns, timing.idle_timeout_ns) == (62 * 10**9, 30 * 10**9)
    assert config.volume_of("blue") is config.volume[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "Data"}, "volume[0].name: string should match"),
        ({"nodes": []}, "volume[0].nodes: list should have at least 1 item"),
        ({"nodes": ["red", "green"]}, "volume[0].nodes: no guest is called 'green'; there are red"),
        ({"nodes": ["red", "red"]}, "volume[0].nodes: 'red' mounts volume[0]; a guest has one"),
        ({"nodes": "red"}, "volume[0].nodes: input should be a valid list"),
        ({"pool": "public"}, "volume[0].pool: input should be 'shared' or 'private'"),
        ({"tree_limit": "much"}, "volume[0].tree_limit: "),
        ({"heartbeat_interval": 0.0}, "volume[0].heartbeat_interval: input should be greater"),
        ({"dead_threshold": 1}, "volume[0].dead_threshold: input should be greater"),
        ({"dead_threshold": 7.5}, "volume[0].dead_threshold: "),
        ({"idle_timeout": 1.0, "keepalive": 2.0}, "volume[0]: keepalive_ns is 2000000000, not"),
        ({"colour": "red"}, "volume[0].colour: there is no such key"),
    ],
)
def test_wrong_value_is_one_line(change: dict[str, Any], says: str) -> None:
    """With the file's name and the key's path."""
    (line,) = complaints(VOLUME | change)

    assert line.startswith(f"c.toml: {says}")


def test_volumes_that_do_not_fit_each_other() -> None:
    """One name, one image, one guest twice: a line each."""
    first = VOLUME | {"image": "/disk.img"}
    second = {"name": "data", "nodes": ["blue"], "image": "/disk.img"}

    assert complaints(first, second) == [
        "c.toml: volume[1].name: 'data' is the name of volume[0]",
        "c.toml: volume[1].image: /disk.img is in use by somebody else",
        "c.toml: volume[1].nodes: 'blue' mounts volume[0]; a guest has one disk",
    ]
    (line,) = complaints(first, guests=[{"name": "red", "image": "/disk.img"}, {"name": "blue"}])
    assert line == "c.toml: volume[0].image: /disk.img is in use by somebody else"


def test_direct_is_for_disks_of_its_own() -> None:
    """A node that has swap has one; of a shared volume the word would mean nothing."""
    (line,) = complaints(VOLUME, guests=[{"name": "red", "direct": True}, {"name": "blue"}])
    assert line.startswith("c.toml: guest[0].direct: is for disks of its own")
    with_swap = {"name": "red", "direct": True, "swap": "1M"}
    assert complaints(VOLUME, guests=[with_swap, {"name": "blue"}]) == []
    alone: list[dict[str, Any]] = [*GUESTS, {"name": "green", "direct": True}]
    assert complaints(VOLUME, guests=alone) == []


def test_timing_of_the_topology(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A name that is none is a usage error."""
    code = main(["up", "--topo", "shared,timing=slow", "--run", str(tmp_path / "run")])

    assert code == 64
    assert capsys.readouterr().err == "tmem: there is no timing 'slow'; there are o2cb, fast\n"


def test_image_with_too_few_slots(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It is said before anything is started."""
    image = tmp_path / "disk.img"
    assert main(["mkfs", str(image), "--size", "64M", "--slots", "1"]) == 0
    (tmp_path / "c.toml").write_text(
        '[[guest]]\nname = "red"\n[[guest]]\nname = "blue"\n'
        f'[[volume]]\nname = "data"\nnodes = ["red", "blue"]\nimage = "{image}"\n'
    )
    capsys.readouterr()

    code = main(["up", "-f", str(tmp_path / "c.toml"), "--run", str(tmp_path / "run"), "-q"])

    error = capsys.readouterr().err
    assert code in (65, 66)
    assert "has 1 slots for 2 nodes; make it anew with more" in error
    assert error.count("\n") == 1


def test_missing_image_of_a_volume(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What makes one is named: not mke2fs, which is for a guest's own image."""
    (tmp_path / "c.toml").write_text(
        '[[guest]]\nname = "red"\n[[guest]]\nname = "blue"\n'
        '[[volume]]\nname = "data"\nnodes = ["red", "blue"]\nimage = "none.img"\n'
    )

    code = main(["up", "-f", str(tmp_path / "c.toml"), "--run", str(tmp_path / "run"), "-q"])

    error = capsys.readouterr().err
    assert code in (65, 66)
    assert "none.img: no such file; make it with tmem mkfs or correct the path" in error
    assert error.count("\n") == 1
