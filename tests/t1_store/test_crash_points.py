"""The hypervisor is killed before every single bytecode of an operation, and started again.

`sys.settrace` with opcode events raises at the n-th bytecode executed in the modules that write
the segment; n goes from the first to the last.  A fresh machine is then recovered from the bytes
of the arena alone and compared with what the guest may rely on: every page that the operation did
not touch is as before, every page that it touched is as before or as after.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from hypervisor import arena as arena_module
from hypervisor import recovery as recovery_module
from hypervisor import store as store_module
from hypervisor.arena import Arena, format_arena
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.recovery import recover
from ipc.abi import PAGE_BYTES, REPLY, REQUEST, Op, oid_from_int, pool_flag_word
from ipc.window import Window, anonymous_window

ARENA_BYTES = 620 * 1024
EPHEMERAL, PERSISTENT = 0, 1
Key = tuple[int, int, int]
"""pool id, object id, index."""

WRITERS = {module.__file__ for module in (arena_module, store_module)}


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


class Rig:
    """A machine over an arena, one client, one window."""

    def __init__(self, arena: Arena) -> None:
        self.machine = Machine(arena)
        recover(self.machine)
        client = self.machine.attach("guest", 1, 1, 0)
        assert client is not None
        self.client = client
        self.window: Window = anonymous_window()

    def call(
        self, op: Op, pool: int = 0, oid: int = 0, index: int = 0, count: int = 0
    ) -> tuple[int, int]:
        """(status, map)."""
        request = REQUEST.pack(1, op, 0, count, pool, index, oid_from_int(oid), 0, 0, 0)
        reply = REPLY.unpack(self.machine.execute(self.client, request, self.window))
        return reply[1], reply[5]

    def put(self, pool: int, oid: int, index: int, count: int, version: int) -> int:
        for slot in range(count):
            self.window.slot(slot)[:] = page(pool, oid, index + slot, version)
        return self.call(Op.PUT_PAGE, pool, oid, index, count)[1]

    def contents(self) -> dict[Key, bytes]:
        """All pages, read without removing any."""
        store = self.machine.store
        return {
            (pool.pool_id, int.from_bytes(key, "little"), number * 64 + place): bytes(
                store.arena.data[frame * PAGE_BYTES : (frame + 1) * PAGE_BYTES]
            )
            for pool in self.client.pools.values()
            for key, found in pool.objects.items()
            if isinstance(key, bytes)
            for number, leaf in found.leaves()
            for place, frame in enumerate(leaf)
            if frame >= 0
        }


def page(pool: int, oid: int, index: int, version: int) -> bytes:
    """A page that says whose it is."""
    return f"{pool} {oid} {index} v{version} ".encode().ljust(64, b"#") * (PAGE_BYTES // 64)


def prepared() -> bytes:
    """The bytes of an arena with both kinds of pools and some pages, nearly full."""
    arena = format_arena(mmap.mmap(-1, ARENA_BYTES))
    rig = Rig(arena)
    rig.call(Op.NEW_POOL, pool_flag_word())
    rig.call(Op.NEW_POOL, pool_flag_word(persist=True))
    rig.put(EPHEMERAL, 1, 60, 8, 1)
    rig.put(PERSISTENT, 2, 60, 8, 1)
    rig.put(EPHEMERAL, 3, 0, 1, 1)
    rig.put(PERSISTENT, 4, 5, 1, 1)
    index = 0
    while (room := rig.machine.store.frames.free - 4) > 0:
        count = min(room, 60)
        rig.put(EPHEMERAL, 9, index, count, 1)
        index += count
    check(rig.machine)
    return bytes(arena.mapping)


def restored(image: bytes) -> Arena:
    """A copy of an arena."""
    mapping = mmap.mmap(-1, len(image))
    mapping[:] = image
    return Arena(mapping)


def killed_at(number: int, files: set[str | None], action: Callable[[], Any]) -> bool:
    """Run `action`; kill it before the number-th bytecode in `files`.  False: it finished."""
    left = number

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Killed:
        return True
    finally:
        sys.settrace(before)
    return False


def bytecodes_of(files: set[str | None], action: Callable[[], Any]) -> int:
    """How many bytecodes `action` executes in `files`."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


ACTIONS: dict[str, tuple[Callable[[Rig], object], set[Key]]] = {
    "put one page": (lambda rig: rig.put(PERSISTENT, 5, 0, 1, 2), {(1, 5, 0)}),
    "put an extent that evicts": (
        lambda rig: rig.put(PERSISTENT, 5, 62, 6, 2),
        {(1, 5, index) for index in range(62, 68)},
    ),
    "replace one page": (lambda rig: rig.put(PERSISTENT, 4, 5, 1, 2), {(1, 4, 5)}),
    "replace an extent": (
        lambda rig: rig.put(PERSISTENT, 2, 60, 8, 2),
        {(1, 2, index) for index in range(60, 68)},
    ),
    "replace ephemeral pages": (
        lambda rig: rig.put(EPHEMERAL, 1, 58, 8, 2),
        {(0, 1, index) for index in range(58, 66)},
    ),
    "get one ephemeral page": (
        lambda rig: rig.call(Op.GET_PAGE, EPHEMERAL, 3, 0, 1),
        {(0, 3, 0)},
    ),
    "get an ephemeral extent": (
        lambda rig: rig.call(Op.GET_PAGE, EPHEMERAL, 1, 60, 8),
        {(0, 1, index) for index in range(60, 68)},
    ),
    "get persistent pages": (lambda rig: rig.call(Op.GET_PAGE, PERSISTENT, 2, 60, 8), set()),
    "flush an extent": (
        lambda rig: rig.call(Op.FLUSH_PAGE, PERSISTENT, 2, 62, 4),
        {(1, 2, index) for index in range(62, 66)},
    ),
    "flush an object and reap": (
        lambda rig: (rig.call(Op.FLUSH_OBJECT, PERSISTENT, 2), rig.machine.store.reap()),
        {(1, 2, index) for index in range(60, 68)},
    ),
    "destroy a pool and reap": (
        lambda rig: (rig.call(Op.DESTROY_POOL, EPHEMERAL), rig.machine.store.reap()),
        {(0, 1, index) for index in range(60, 68)}
        | {(0, 3, 0)}
        | {(0, 9, index) for index in range(256)},
    ),
    "make a pool": (lambda rig: rig.call(Op.NEW_POOL, pool_flag_word(persist=True)), set()),
    "the guest departs": (
        lambda rig: rig.machine.depart(rig.client),
        {(pool, oid, index) for pool in (0, 1) for oid in range(10) for index in range(256)},
    ),
}


@pytest.mark.parametrize("name", list(ACTIONS))
def test_a_kill_at_any_bytecode_loses_nothing_and_revives_nothing(name: str) -> None:
    """Every page is as it was before the operation, or as the operation leaves it."""
    action, touched = ACTIONS[name]
    image = prepared()
    before = Rig(restored(image)).contents()
    finished = Rig(restored(image))
    action(finished)
    after = finished.contents()

    number = 0
    while True:
        arena = restored(image)
        rig = Rig(arena)
        was_killed = killed_at(number, WRITERS, lambda rig=rig: action(rig))  # type: ignore[misc]
        survivor = Rig(arena)
        check(survivor.machine)
        now = survivor.contents()
        for key in before.keys() | after.keys() | now.keys():
            allowed = {before.get(key)}
            if key in touched:
                allowed.add(after.get(key))
            if key[0] == EPHEMERAL:
                # Room was made: an ephemeral page may go at any time, but only whole.
                allowed.add(None)
            assert now.get(key) in allowed, f"killed before bytecode {number}: {key}"
        if not was_killed:
            break
        number += 1
    assert number > 20 or not touched


def test_recovery_itself_can_be_killed_at_any_bytecode() -> None:
    """A hypervisor that dies while it recovers is recovered by the next one."""
    arena = restored(prepared())
    rig = Rig(arena)
    rig.call(Op.FLUSH_OBJECT, PERSISTENT, 2)
    rig.call(Op.DESTROY_POOL, EPHEMERAL)
    image = bytes(arena.mapping)
    expected = Rig(restored(image)).contents()
    assert expected

    files = WRITERS | {recovery_module.__file__}
    arena = restored(image)
    total = bytecodes_of(files, lambda: Rig(arena))
    assert total > 1000
    for number in range(0, total, total // 200):
        arena = restored(image)
        assert killed_at(number, files, lambda arena=arena: Rig(arena))  # type: ignore[misc]
        survivor = Rig(arena)
        check(survivor.machine)
        assert survivor.contents() == expected, f"killed before bytecode {number}"


def test_the_cut_sees_a_broken_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method has teeth: with the state word published before the data, a cut finds it."""
    original = store_module.Store.put_one

    def publish_first(self: Any, pool: Any, oid: bytes, index: int, slots: Any, slot: int) -> Any:
        frame = self.frames.kinds.find(3)
        target = pool.objects.get(oid) or self._new_object(pool, oid)
        self._object_column[frame] = target.number
        self._index_column[frame] = index
        self._state_column[frame] = self.sequence + 1
        return original(self, pool, oid, index, slots, slot)

    image = prepared()
    monkeypatch.setattr(store_module.Store, "put_one", publish_first)
    files = {*WRITERS, __file__}
    wrong = 0
    for number in range(0, 600, 3):
        arena = restored(image)
        rig = Rig(arena)
        killed_at(number, files, lambda rig=rig: rig.put(PERSISTENT, 5, 0, 1, 2))  # type: ignore[misc]
        now = Rig(arena).contents()
        wrong += now.get((1, 5, 0)) not in (None, page(1, 5, 0, 2))
    assert wrong > 0
