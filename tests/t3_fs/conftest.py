"""Fixtures: images that are judged at the end of the test."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs.vfs import Vfs
from tests.support.tools import need_tool
from tests.t3_fs.images import BLOCK, Image, MakeImage


@pytest.fixture
def make_image(tmp_path: Path) -> Iterator[MakeImage]:
    """Makes ext2 images; each is judged at the end of the test."""
    images: list[Image] = []
    numbers = itertools.count()

    def make(
        *,
        kind: str = "ext2",
        block_bytes: int = BLOCK,
        blocks: int = 1024,
        tree: Path | None = None,
        options: tuple[str, ...] = (),
    ) -> Image:
        path = tmp_path / f"image{next(numbers)}"
        with path.open("wb") as file:
            file.truncate(blocks * BLOCK)
        command = [need_tool("mke2fs"), "-q", "-t", kind, "-b", str(block_bytes)]
        command += ["-d", str(tree)] if tree else []
        subprocess.run([*command, *options, str(path)], check=True, capture_output=True)
        images.append(Image(path))
        return images[-1]

    yield make
    for image in images:
        if image.judged:
            image.judge(tmp_path / f"dump{next(numbers)}")
        image.unmount()


@pytest.fixture
def image(make_image: MakeImage) -> Image:
    """An empty file system of 4 MiB."""
    return make_image()


@pytest.fixture
def vfs(image: Image) -> Vfs:
    """The same, mounted for writing."""
    return image.mount()
