"""Same-page merging by the host's kernel: what it makes of a guest's RAM.

A guest whose RAM is mergeable (MADV_MERGEABLE) shares frames with whoever has equal ones, if the
host's KSM runs (/sys/kernel/mm/ksm/run is 1; the administrator's business).  It finds what is equal
in RAM; tmem's own sharing finds it in tmem.  So they add up, and the figures are told apart.
"""

from __future__ import annotations

import logging
import mmap
from typing import Any

from guests.keptfiles import MERGING, read_text

log = logging.getLogger(__name__)


def make_mergeable(mapping: mmap.mmap) -> bool:
    """Let the host merge a mapping's pages; False where its kernel has no KSM."""
    try:
        mapping.madvise(mmap.MADV_MERGEABLE)
    except (AttributeError, OSError) as reason:
        log.warning("ksm event=not-available why=%s", reason)
        return False
    return True


def figures(pid: int | None = None) -> dict[str, Any]:
    """Of a process (this one if none is named): pages that are merged with others, and the bytes
    that this saves the host.

    `runs` says whether the host looks for equal pages at all; zeros where there is no KSM.
    """
    values: dict[str, int] = {}
    try:
        for line in read_text(f"/proc/{pid or 'self'}/ksm_stat").splitlines():
            name, _, value = line.replace(":", " ").partition(" ")
            if value.strip().lstrip("-").isdigit():
                values[name] = int(value)
        runs = read_text(MERGING).strip() == "1"
    except OSError:
        runs = False
    return {
        "runs": runs,
        "merged_pages": values.get("ksm_merging_pages", 0),
        "profit_bytes": values.get("ksm_process_profit", 0),
    }
