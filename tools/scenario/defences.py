"""Which defences this build has, so that a scenario of one that is not there says so.

A defence is a field of what a process is started with; a scenario turns it on or leaves it off.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

from guests.node import NodeSpec
from hypervisor.boot import HypervisorSpec

_HYPERVISOR: Final = {field.name for field in fields(HypervisorSpec)}
_NODE: Final = {field.name for field in fields(NodeSpec)}


def checksums(*, on: bool) -> dict[str, Any] | None:
    """Fields of a hypervisor with checksums of pages, or without; None if it can have none."""
    return {"checksums": on} if "checksums" in _HYPERVISOR else None


def verification(*, on: bool) -> dict[str, Any]:
    """Fields of a node whose file system verifies what it gets; empty if it can't or shall not."""
    return {"verify": True} if on and "verify" in _NODE else {}
