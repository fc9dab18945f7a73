"""What processes of a cluster have in common, and what they must not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.clusters import short_folder
from tests.support.secrecy import write_hash
from tools.processes import ProcessFactory


def test_guests_do_not_know_the_hypervisors_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is forked from one server has its seed, so the hypervisor is started apart; and then
    PYTHONHASHSEED, which a guest may know, says nothing."""
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    with short_folder() as folder:
        factory = ProcessFactory(folder, folder / "console")
        factory.start()
        try:
            hashes = []
            for number, apart in enumerate((False, False, True, True)):
                path = folder / f"hash{number}"
                process = factory.spawn(write_hash, path, path.name, apart=apart)
                process.join()
                assert process.exitcode == 0, Path(folder / "console").read_text()
                process.close()
                hashes.append(path.read_text())
        finally:
            factory.close()
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
