"""RAM that the host's kernel may merge, where it can."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests import ksm
from tests.support.clusters import wait_until
from tests.t4_guest.worlds import PAGE, running_kernel

SYSTEM = Path("/sys/kernel/mm/ksm")
PAGES = 500


@pytest.fixture
def merging() -> Iterator[bool]:
    """Whether the host looks for equal pages now, quickly; as it was before in the end."""
    names = ("run", "sleep_millisecs", "pages_to_scan")
    try:
        before = {name: (SYSTEM / name).read_text() for name in names}
        (SYSTEM / "sleep_millisecs").write_text("1")
        (SYSTEM / "pages_to_scan").write_text("20000")
        (SYSTEM / "run").write_text("1")
    except OSError:
        yield False
        return
    yield True
    for name, value in before.items():
        (SYSTEM / name).write_text(value)


def test_equal_pages_are_merged_by_the_host(image: Path, *, merging: bool) -> None:
    """The process has less, and reads the same; where the host has no KSM, nothing is claimed."""
    with running_kernel(image, memory_bytes=4 << 20, ksm=True) as kernel:
        process = kernel.userland.processes.spawn("program")
        address = process.map(PAGES * PAGE)
        process.write(address, bytes(range(1, 129)) * 32 * PAGES)
        assert kernel.counters()["ksm"]["runs"] == merging
        if merging:
            assert kernel.memory.is_mergeable
            wait_until(lambda: ksm.figures()["merged_pages"] > PAGES // 2, "merged pages")
            assert kernel.counters()["ksm"]["profit_bytes"] > PAGES // 4 * PAGE
        else:
            assert kernel.counters()["ksm"]["merged_pages"] == 0
        assert process.read(address, PAGES * PAGE) == bytes(range(1, 129)) * 32 * PAGES


def test_a_mapping_that_can_not_be_merged_is_said_to_be(expect_warning: object) -> None:
    """Nothing ends for that."""
    expect_warning("ksm event=not-available")  # type: ignore[operator]

    class Mapping:
        def madvise(self, _advice: int) -> None:
            raise OSError(22, "Invalid argument")

    assert not ksm.make_mergeable(Mapping())  # type: ignore[arg-type]
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        assert ksm.make_mergeable(mapping) == SYSTEM.exists()
