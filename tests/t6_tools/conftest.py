"""Fixtures of commands."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ipc.attach import enrol
from ipc.names import process_start
from tests.support.clusters import short_folder
from tests.support.standin import Standin
from tools.rundir import ENVIRONMENT, ClusterDirectory, ClusterRecord


@pytest.fixture
def hypervisor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """A cluster in whose directory the stand-in answers; commands find it by the environment."""
    with short_folder() as folder:
        monkeypatch.setenv(ENVIRONMENT, str(folder))
        directory = ClusterDirectory(folder)
        directory.make()
        start = process_start(os.getpid())
        assert start is not None
        directory.write(ClusterRecord("x", 16 << 20, [], os.getpid(), start))
        for name in ("alpha", "bravo", "carol"):
            enrol(folder, name, bytes(32), os.getuid())
        standin = Standin(folder)
        yield standin
        standin.close()
