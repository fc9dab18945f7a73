"""Fixtures of real clusters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clusters import cluster_toml, short_folder, write_tree
from tests.support.tools import need_tool


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder to run commands in."""
    with short_folder() as path:
        yield path


@pytest.fixture
def cluster_file(folder: Path, cluster_name: str) -> Path:
    """A cluster of the guests red and blue, which don't fit their memory."""
    need_tool("mke2fs")
    tree = write_tree(folder / "tree")
    path = folder / "cluster.toml"
    path.write_text(cluster_toml(cluster_name, tree))
    return path
