"""The benchmark of what a page costs on its way through tmem."""

from __future__ import annotations

import json
from itertools import product

import pytest

from ipc.errors import InvariantError
from tools.bench.clients import BATCHES, Bench, main, table

OPERATIONS = {
    "frontswap store",
    "frontswap load",
    "frontswap free",
    "cleancache put",
    "cleancache get",
}


def test_a_short_run_tells_both_sides_of_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    """Each case has its line and column, and nothing is free."""
    assert main(["--pages", "64", "--repetitions", "1", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    cases = {(record["operation"], record["compressed"], record["batch"]) for record in records}
    assert cases == set(product(OPERATIONS, (False, True), BATCHES))
    assert all(record["guest_us"] > 0 and record["hypervisor_us"] > 0 for record in records)
    assert len(table(records)) == 1 + 2 * len(OPERATIONS)


def test_pages_are_compressed_where_it_says_so() -> None:
    """And come back, or it is no figure."""
    pages = [bytes([number]) * 2000 + bytes(2096) for number in range(1, 65)]
    for compress in (False, True):
        bench = Bench(pages, compress=compress)
        assert {case.compressed for case, _, _ in bench.measure(8)} == {compress}
        assert bool(bench.machine.store.contents.compressed.cpu_ns) == compress


def test_a_wrong_page_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page is compared."""
    monkeypatch.setattr("guests.frontswap.Frontswap.load", lambda *_: True)
    with pytest.raises(InvariantError, match="came back wrong"):
        list(Bench([bytes([1]) * 4096] * 32, compress=False).measure(8))
