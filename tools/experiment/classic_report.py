"""What `tmem experiment classic` found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(found: dict[str, Any], folder: Path) -> Path:
    """Write the report's files; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    return folder


def markdown(found: dict[str, Any]) -> str:
    """The points as a table."""
    return "\n".join(str(point) for point in found["points"])
