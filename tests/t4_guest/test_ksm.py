"""RAM that the host's kernel may merge, where it can."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests import ksm
from tests.support.clusters import wait_until
from tests.t4_guest.worlds import PAGE, running_kernel
from tools.experiment.merging import merging as host_merges
from tools.experiment.merging import why_not

SYSTEM = Path("/sys/kernel/mm/ksm")
PAGES = 500


@pytest.fixture
def merging() -> Iterator[bool]:
    """Whether the host looks for equal pages now, quickly; as it was before in the end."""
    if why_not() is not None:
        yield False
        return
    with host_merges(4 * PAGES):
        yield True


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
