"""How much is measured: the sizes and lengths of one run of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sizes in pages of 4 KiB or MiB; a *phase* times one kind of call for `phase_seconds`."""

    phase_seconds: float = 0.3
    repetitions: int = 7
    working_set_pages: int = 24576
    """96 MiB: well above the last-level cache's share of a core, so that memory is cold."""
    full_mib: int = 1024
    metadata_mib: int = 1024
    bounded_pages: int = 1 << 20
    """Given up at once while another guest's calls are timed."""
    guest_counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    patience_seconds: float = 5.0
    """How long a repetition waits for a quiet machine before it goes ahead all the same."""
    seed: int = 1


QUICK = Plan(phase_seconds=0.06, repetitions=5, patience_seconds=1.0, bounded_pages=1 << 15)
FULL = Plan()
