"""Same-page merging by the host's kernel: what it makes of a guest's RAM.

A guest whose RAM is mergeable (MADV_MERGEABLE) shares frames with whoever has equal ones, if the
host's KSM runs (/sys/kernel/mm/ksm/run is 1; the administrator's business).  It finds what is equal
in RAM; tmem's own sharing finds it in tmem.  So they add up, and the figures are told apart.
"""

from __future__ import annotations

import logging
import mmap
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

_STATISTICS: Final = Path("/proc/self/ksm_stat")
_RUN: Final = Path("/sys/kernel/mm/ksm/run")


def make_mergeable(mapping: mmap.mmap) -> bool:
    """Let the host merge a mapping's pages; False where its kernel has no KSM."""
    try:
        mapping.madvise(mmap.MADV_MERGEABLE)
    except (AttributeError, OSError) as reason:
        log.warning("ksm event=not-available why=%s", reason)
        return False
    return True


def figures() -> dict[str, Any]:
    """Of this process: pages that are merged with others, and the bytes that this saves the host.

    `runs` says whether the host looks for equal pages at all; zeros where there is no KSM.
    """
    values: dict[str, int] = {}
    try:
        for line in _STATISTICS.read_text().splitlines():
            name, _, value = line.replace(":", " ").partition(" ")
            if value.strip().lstrip("-").isdigit():
                values[name] = int(value)
        runs = _RUN.read_text().strip() == "1"
    except OSError:
        runs = False
    return {
        "runs": runs,
        "merged_pages": values.get("ksm_merging_pages", 0),
        "profit_bytes": values.get("ksm_process_profit", 0),
    }
