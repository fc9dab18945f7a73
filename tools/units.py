"""Sizes as people write and read them: bytes with binary units."""

from __future__ import annotations

import re
from typing import Final

PAGE_BYTES: Final = 4096

_SIZE: Final = re.compile(r"\s*(\d+)\s*(?:([KMGT])(?:i?B)?|B)?\s*\Z", re.IGNORECASE)
_UNITS: Final = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str | int) -> int:
    """Bytes of `64M`, `64MiB` or `67108864`; a unit is always binary.  Raises ValueError."""
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise ValueError("a size is a number of bytes or a text such as '64M'")
    if isinstance(text, int):
        if text < 0:
            raise ValueError("a size can't be negative")
        return text
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is no size; write a number of bytes or, for example, '64M'")
    number, unit = match.groups()
    return int(number) * _UNITS.get((unit or "").upper(), 1)


def format_size(size_bytes: float) -> str:
    """`67108864` as `64.0 MiB`."""
    if size_bytes < 0:
        return f"-{format_size(-size_bytes)}"
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
