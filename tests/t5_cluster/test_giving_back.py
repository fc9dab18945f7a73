"""Memory given back is really given back: the segment and the kernel say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES, Op
from ipc.attach import CONTROL_SOCKET
from ipc.segment import allocated_bytes
from tests.support.hypervisors import running_hypervisor
from tools.bench.giveback import flush_all

ARENA_BYTES = 128 << 20


def shmem_bytes() -> int:
    """Shared memory of the whole machine, from /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Shmem in /proc/meminfo")


@pytest.mark.cluster
def test_flush_all_returns_the_memory_to_the_host(cluster_name: str, tmp_path: Path) -> None:
    """Ephemeral memory is free in the arena, not allocated in the segment, and the kernel's again.

    What is persistent stays and is right.
    """
    with running_hypervisor(cluster_name, tmp_path, ARENA_BYTES) as hypervisor:
        guest = hypervisor.attach("guest")
        ephemeral, persistent = (guest.new_pool(persist=persist) for persist in (False, True))
        slots = guest.channel.window.slots
        for slot in range(EXTENT_PAGES_MAX):
            slots[slot * PAGE_BYTES : (slot + 1) * PAGE_BYTES] = bytes([slot + 1, 7]) * 2048
            slots[slot * PAGE_BYTES] = 0
        for number in range(ARENA_BYTES // PAGE_BYTES // EXTENT_PAGES_MAX - 8):
            guest.call(Op.PUT_PAGE, ephemeral, number, 0, EXTENT_PAGES_MAX)
        guest.call(Op.PUT_PAGE, persistent, 1, 0, EXTENT_PAGES_MAX)
        segment = (tmp_path / "arena").read_text().strip()
        full, kernel_full = allocated_bytes(segment), shmem_bytes()

        flush_all(tmp_path / CONTROL_SOCKET)

        empty, kernel_empty = allocated_bytes(segment), shmem_bytes()
        assert full > 100 << 20
        assert empty < 8 << 20
        # Other tests have segments, too: some of what went may have come there.
        assert kernel_full - kernel_empty > 50 << 20
        assert guest.call(Op.GET_PAGE, ephemeral, 1, 0, 1).map == 0
        assert guest.call(Op.GET_PAGE, persistent, 1, 0, EXTENT_PAGES_MAX).map == 2**64 - 1
        assert slots[3 * PAGE_BYTES + 1] == 7
        # What was given back can be used again.
        for number in range(64):
            reply = guest.call(Op.PUT_PAGE, ephemeral, number, 0, EXTENT_PAGES_MAX)
            assert reply.map == 2**64 - 1
        assert allocated_bytes(segment) > empty + (15 << 20)
        guest.detach()
        hypervisor.stop()
