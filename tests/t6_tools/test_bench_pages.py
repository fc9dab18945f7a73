"""The benchmark of what pages cost: its figures are of pages that came back."""

from __future__ import annotations

import json

import pytest

from ipc.abi import PAGE_BYTES
from tools.bench.pages import WAYS, main, tables


def test_a_short_run_tells_bytes_and_time_of_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    """What must hold of any machine's files."""
    assert main(["--pages", "200", "--repetitions", "1", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    held = {(record["pages"], record["way"]): record["held_bytes"] for record in records}
    kinds = {record["pages"] for record in records}

    assert set(held) == {(kind, way.name) for kind in kinds for way in WAYS}
    assert all(held[kind, "raw"] == PAGE_BYTES for kind in kinds)
    assert held["zeros", "filled"] < 0.02 * PAGE_BYTES
    assert held["text", "lz4hc"] <= held["text", "lz4"] < 0.8 * PAGE_BYTES
    assert held["random", "lz4"] == PAGE_BYTES < held["random", "all"] < 1.05 * PAGE_BYTES
    assert held["programs", "shared by 4"] < 0.3 * PAGE_BYTES
    assert all(record["put_us"] > 0 for record in records)
    assert len(tables(records)) == 4 * (len(WAYS) + 2) - 1
