"""SIGKILL at any instruction, without a process.

What a killed hypervisor leaves is the bytes of its arena, so all that has to be known is which
bytes those may be.  `images_of` runs an action under `sys.settrace` and keeps a copy of the arena
whenever it changed between two bytecodes of the modules that write it: a kill before any of those
bytecodes leaves one of these images, and no other.  A bytecode that stores more than one word may
itself be cut, so halves of its words are images, too.

`killed_at` does kill, by an exception before the n-th bytecode; for random histories, where it is
enough to die once.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import hypervisor
from hypervisor.arena import Arena

_HOME = Path(hypervisor.__file__).parent
_READERS = ("administration", "boot", "invariants", "recovery", "snapshot")


def _uses_the_arena(path: Path) -> bool:
    return path.stem == "arena" or re.search(r"arena\.[a-z]", path.read_text()) is not None


WRITERS: set[str | None] = {
    str(path) for path in _HOME.glob("*.py") if path.stem not in _READERS and _uses_the_arena(path)
}
"""Files of the modules that may write to the segment while guests are served."""
RECOVERERS = WRITERS | {str(_HOME / "recovery.py")}

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)

Trace = Callable[[FrameType, str, Any], Any]


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@contextmanager
def traced(files: set[str | None], at_opcode: Callable[[], None]) -> Iterator[None]:
    """Have `at_opcode` called before each bytecode in `files`."""

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            at_opcode()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def bytecodes_of(files: set[str | None], action: Callable[[], Any]) -> int:
    """How many bytecodes `action` executes in `files`."""
    count = 0

    def at_opcode() -> None:
        nonlocal count
        count += 1

    with traced(files, at_opcode):
        action()
    return count


def killed_at(number: int, files: set[str | None], action: Callable[[], Any]) -> bool:
    """Run `action`; kill it before the number-th bytecode in `files`.  False: it finished."""
    left = number

    def at_opcode() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    try:
        with traced(files, at_opcode):
            action()
    except Killed:
        return True
    return False


def images_of(segment: Arena, files: set[str | None], action: Callable[[], Any]) -> list[bytes]:
    """All states in which a kill during `action` may leave the arena, that before it included and
    that after it last; stores of several words are cut in half."""
    mapping = segment.mapping
    where = segment.layout
    last = mapping[:]
    images = [last]
    length = len(last)
    held = ctypes.c_char.from_buffer(mapping)
    address = ctypes.addressof(held)

    def look() -> None:
        nonlocal last
        # A copy at every bytecode would cost five times as much.
        if _memcmp(address, last, length):
            now = mapping[:]
            images.extend(_halves(last, now, where.data, where.object_word))
            images.append(now)
            last = now

    with traced(files, look):
        action()
    look()
    del held
    return images


def _halves(before: bytes, after: bytes, data: int, data_end: int) -> list[bytes]:
    """The lower or the upper half of the words that changed, if there are several: the C library
    may copy either end first.  What is copied into a page frame is not published yet, so half of it
    is as good as all."""
    changed = [*_changed(before, after, 0, data), *_changed(before, after, data_end, len(after))]
    if len(changed) < 2:
        return []
    halves = []
    for part in (changed[: len(changed) // 2], changed[len(changed) // 2 :]):
        half = bytearray(before)
        for at in part:
            half[at : at + 8] = after[at : at + 8]
        halves.append(bytes(half))
    return halves


def _changed(before: bytes, after: bytes, start: int, end: int) -> list[int]:
    """Offsets of the words that differ."""
    return [
        word
        for block in range(start, end, 4096)
        if before[block : block + 4096] != after[block : block + 4096]
        for word in range(block, min(block + 4096, end), 8)
        if before[word : word + 8] != after[word : word + 8]
    ]
