"""Fixtures of real clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    return _write_cluster(folder, cluster_name)


@pytest.fixture(scope="module")
def module_folder() -> Iterator[Path]:
    """A folder for what all tests of a module look at."""
    with short_folder() as path:
        yield path


@pytest.fixture(scope="module")
def module_cluster_file(module_folder: Path, new_cluster_name: Callable[[], str]) -> Path:
    """The same cluster as `cluster_file`, in it."""
    return _write_cluster(module_folder, new_cluster_name())


def _write_cluster(folder: Path, name: str) -> Path:
    need_tool("mke2fs")
    tree = write_tree(folder / "tree")
    path = folder / "cluster.toml"
    path.write_text(cluster_toml(name, tree))
    return path
