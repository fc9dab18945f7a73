"""Uuids of shared pools as people write and read them: 8-4-4-4-12 hex digits, dashes optional.

Inside and on sockets a uuid is 32 lower-case hex digits, the 16 bytes of a NEW_POOL call in their
order.  Xen's parser misread the digits A to F for years; here either case is right.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, Final

from ipc.abi import ANY_UUID

_UUID: Final = re.compile(r"([0-9a-f]{8})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{12})")
_EXAMPLE: Final = "abcdef01-2345-6789-1234-567890abcdef"


def parse_uuid(value: Any) -> str:
    """32 hex digits of a uuid; raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"a uuid is a text such as {_EXAMPLE!r}")
    text = value.strip().lower()
    match = _UUID.fullmatch(text)
    digits = "".join(match.groups()) if match else text
    if re.fullmatch(r"[0-9a-f]{32}", digits) is None:
        raise ValueError(f"{value!r} is no uuid; write 32 hex digits, for example {_EXAMPLE}")
    if bytes.fromhex(digits) == ANY_UUID:
        raise ValueError(f"{value!r} means 'no uuid' in a call, so no shared pool can have it")
    return digits


def format_uuid(digits: str) -> str:
    """32 hex digits with the usual dashes; anything else as it is."""
    if len(digits) != 32:
        return digits
    cuts = (0, 8, 12, 16, 20, 32)
    return "-".join(digits[start:end] for start, end in itertools.pairwise(cuts))
