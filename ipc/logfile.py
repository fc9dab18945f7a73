"""Where a process of a cluster writes its log: one file each, one line an event.

The file is turned over once, at `LOG_BYTES_MAX`: a guest that attaches and leaves in a loop writes
lines into the hypervisor's log, but can't fill the disk.
"""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path
from typing import Final

LOG_BYTES_MAX: Final = 16 * 2**20


def log_to(path: Path) -> None:
    """Send this process's log to a file, which it shares with no other process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        handlers=[
            logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES_MAX, backupCount=1)
        ],
        level=logging.INFO,
        format="%(asctime)s.%(msecs)03d %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
