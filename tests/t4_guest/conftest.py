"""Fixtures: an empty image that e2fsck judges at the end, and a machine to attach to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t4_guest.worlds import LocalHypervisor, assert_clean, make_image


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """An empty ext2 image of 8 MiB; it must be clean when the test is over."""
    path = make_image(tmp_path / "image")
    yield path
    assert_clean(path)


@pytest.fixture
def hypervisor() -> LocalHypervisor:
    """A machine in this process, large enough to keep everything that a test puts."""
    return LocalHypervisor(4 << 20)
