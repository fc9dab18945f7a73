"""Fixtures: OCFS2 images that fsck.ocfs2 and debugfs.ocfs2 judge at the end of the test."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fs.block.file import FileDevice
from fs.ocfs2 import mkfs
from fs.vfs import Vfs
from tests.support.ocfs2 import Volume, make_volume

MakeVolume = Callable[..., Volume]


@pytest.fixture(scope="session")
def fresh_images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """Empty images by size in MiB and number of slots, each made once."""
    folder = tmp_path_factory.mktemp("fresh")
    made: dict[tuple[int, int], Path] = {}

    def fresh(mebibytes: int, slots: int) -> Path:
        if (mebibytes, slots) not in made:
            made[mebibytes, slots] = make_volume(
                folder / f"{mebibytes}-{slots}", mebibytes=mebibytes, slots=slots
            )
        return made[mebibytes, slots]

    return fresh


@pytest.fixture
def make_image(tmp_path: Path, fresh_images: Callable[[int, int], Path]) -> Iterator[MakeVolume]:
    """Makes images; each is judged at the end of the test."""
    volumes: list[Volume] = []
    numbers = itertools.count()

    def make(mebibytes: int = 24, slots: int = 2) -> Volume:
        path = tmp_path / f"volume{next(numbers)}"
        shutil.copyfile(fresh_images(mebibytes, slots), path)
        volumes.append(Volume(path))
        return volumes[-1]

    yield make
    for volume in volumes:
        if volume.judged:
            volume.judge(tmp_path / f"dump{next(numbers)}")
        else:
            volume.unmount()


@pytest.fixture
def volume(make_image: MakeVolume) -> Volume:
    """An empty volume of 24 MiB with two slots."""
    return make_image()


@pytest.fixture
def vfs(volume: Volume) -> Vfs:
    """The same, mounted for writing."""
    return volume.mount()


@pytest.fixture
def volume_with_attributes(tmp_path: Path) -> Iterator[Volume]:
    """One whose inodes may have extended attributes."""
    path = tmp_path / "volume"
    with path.open("wb") as file:
        file.truncate(40 << 20)
    device = FileDevice(path)
    parameters = mkfs.Parameters(2, bytes(range(16)), 0x1234, 1_700_000_000, attributes=True)
    mkfs.make_volume(device, parameters, fresh=True)
    device.close()
    volume = Volume(path)
    yield volume
    if volume.judged:
        volume.judge(tmp_path / "dump")
    else:
        volume.unmount()
