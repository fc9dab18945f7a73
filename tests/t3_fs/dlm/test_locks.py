"""Locks as a file system uses them: cached, nested, given up when another wants them."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from fs.dlm.locks import NodeLocks
from fs.dlm.messages import VALUE_BYTES
from fs.dlm.modes import Mode
from fs.dlm.twin import Twin
from tests.t3_fs.dlm.rota import Program

A, B, C = b"M-a", b"M-b", b"M-c"
NL, PR, EX = Mode.NL, Mode.PR, Mode.EX


class Impatient(Exception):
    """Somebody does not want to wait any more."""


class Nodes:
    """Nodes whose waiting lets messages arrive and the other nodes serve."""

    def __init__(self, count: int) -> None:
        self.twin = Twin()
        self.pumps_left = 2000
        self.locks = [
            NodeLocks(node, self.twin.transport(node), self._pump_of(node), label=f"web{node}")
            for node in range(count)
        ]
        self.downs: list[tuple[int, bytes, Mode]] = []
        for node, locks in enumerate(self.locks):
            self.twin.attach(node, locks.manager)
            locks.downconvert = self._note_of(node)
        for locks in self.locks:
            locks.manager.set_view(1, frozenset(range(count)))
        self.arrive()

    def arrive(self) -> None:
        while links := self.twin.ready():
            self.twin.arrive(links[0])

    def _pump_of(self, node: int) -> Callable[[], None]:
        def pump() -> None:
            self.pumps_left -= 1
            if self.pumps_left < 0:
                raise Impatient
            self.arrive()
            for number, locks in enumerate(self.locks):
                if number != node:
                    locks.serve()

        return pump

    def _note_of(self, node: int) -> Callable[[bytes, Mode], None]:
        def note(name: bytes, to: Mode) -> None:
            self.downs.append((node, name, to))

        return note


def test_a_lock_stays_until_another_node_wants_it() -> None:
    """And only goes as far down as the other needs."""
    nodes = Nodes(2)
    zero, one = nodes.locks
    zero.acquire(A, EX)
    zero.release(A, EX)
    sent = nodes.pumps_left
    zero.acquire(A, PR)
    zero.acquire(A, EX)
    zero.release(A, EX)
    zero.release(A, PR)
    assert nodes.pumps_left == sent  # nobody had to be asked
    one.acquire(A, PR)
    assert nodes.downs == [(0, A, PR)]
    zero.acquire(A, PR)  # both read
    assert nodes.downs == [(0, A, PR)]
    one.release(A, PR)
    zero.release(A, PR)
    one.acquire(A, EX)
    assert nodes.downs[1:] == [(0, A, NL)]  # one keeps its PR while it converts


def test_a_lock_in_use_is_not_given_up() -> None:
    """But it is lent again to its own node."""
    nodes = Nodes(2)
    zero, one = nodes.locks
    zero.acquire(A, EX)
    nodes.pumps_left = 20
    with pytest.raises(Impatient):
        one.acquire(A, PR)
    assert nodes.downs == []
    nodes.pumps_left = 20
    zero.acquire(A, PR)  # nested, though another waits
    zero.release(A, EX)
    zero.release(A, PR)
    assert one.manager.mode(A) is None


def test_who_stopped_waiting_may_ask_again() -> None:
    """An exception out of the pump cancels the request."""
    nodes = Nodes(2)
    zero, one = nodes.locks
    zero.acquire(A, EX)
    nodes.pumps_left = 3
    with pytest.raises(Impatient):
        one.acquire(A, EX)
    nodes.pumps_left = 50
    zero.release(A, EX)
    one.acquire(A, EX)
    assert one.manager.mode(A) == EX


def test_try_acquire_disturbs_nobody() -> None:
    """No BAST, no downconvert."""
    nodes = Nodes(2)
    zero, one = nodes.locks
    zero.acquire(A, PR)
    zero.release(A, PR)
    assert not one.try_acquire(A, EX)
    assert one.try_acquire(A, PR)
    assert nodes.downs == []
    assert zero.uses == 0 and one.uses == 1


def test_two_readers_that_want_to_write() -> None:
    """In use: one is told EDEADLK. Out of use: it gives way by itself."""
    nodes = Nodes(2)
    zero, one = nodes.locks
    for locks in nodes.locks:
        locks.acquire(A, PR)
    program = Program(lambda program: one.acquire(A, EX))
    one._pump = program.wait
    program.run()
    nodes.arrive()
    with pytest.raises(OSError, match="wants to write too") as problem:
        zero.acquire(A, EX)
    assert problem.value.errno == errno.EDEADLK
    zero.release(A, PR)
    nodes.arrive()
    program.run()
    assert program.ended and one.manager.mode(A) == EX


def test_value_and_token_count_while_held() -> None:
    """Not before, not after."""
    nodes = Nodes(2)
    zero, one = nodes.locks
    value = b"v" * VALUE_BYTES
    zero.acquire(A, EX)
    assert zero.value(A) == bytes(VALUE_BYTES)
    zero.set_value(A, value)
    token = zero.token(A)
    zero.release(A, EX)
    one.acquire(A, EX)
    assert one.value(A) == value
    assert one.token(A) == token + 1
    assert zero.value(A) is None and zero.token(A) == 0


def test_the_callback_may_use_what_it_gives_up_and_take_other_locks() -> None:
    """G4."""
    nodes = Nodes(2)
    zero, one = nodes.locks
    seen = []

    def writes_back(name: bytes, to: Mode) -> None:
        if name == A:
            zero.acquire(A, EX)  # still held
            zero.acquire(B, EX)  # one has it, and gives it up
            seen.append((name, to, zero.manager.mode(A)))
            zero.release(B, EX)
            zero.release(A, EX)

    zero.acquire(A, EX)
    zero.release(A, EX)
    one.acquire(B, EX)
    one.release(B, EX)
    zero.downconvert = writes_back
    one.acquire(A, EX)
    assert seen == [(A, NL, EX)]
    assert nodes.downs == [(1, B, NL)]


def test_the_callback_may_drop_the_lock() -> None:
    """The inode may leave memory on this occasion."""
    nodes = Nodes(2)
    zero, one = nodes.locks
    zero.acquire(A, EX)
    zero.release(A, EX)
    zero.downconvert = lambda name, to: zero.drop(name)
    one.acquire(A, EX)
    assert A not in zero.manager.locks
    zero.downconvert = lambda name, to: None
    one.release(A, EX)
    zero.acquire(A, EX)


def test_a_callback_that_fails_keeps_the_lock_and_is_tried_again() -> None:
    """G5."""
    nodes = Nodes(2)
    zero, one = nodes.locks
    zero.acquire(A, EX)
    zero.release(A, EX)
    attempts = []

    def fails_once(name: bytes, to: Mode) -> None:
        attempts.append(name)
        if len(attempts) == 1:
            raise OSError(errno.EIO, "the disk")

    zero.downconvert = fails_once
    with pytest.raises(OSError, match="the disk"):
        one.acquire(A, EX)  # this test's pump serves node 0 inside of node 1's wait
    assert zero.manager.mode(A) == EX
    one.acquire(A, EX)
    assert len(attempts) == 2


def test_other_locks_are_given_up_while_waiting_and_after_the_last_use() -> None:
    """G3."""
    nodes = Nodes(2)
    zero, one = nodes.locks
    for name in (A, B):
        zero.acquire(name, EX)
    nodes.pumps_left = 3
    with pytest.raises(Impatient):
        one.acquire(A, PR)
    one.manager.lock(B, PR)
    nodes.arrive()
    zero.release(A, EX)
    assert nodes.downs == []  # an operation of node 0 still runs
    zero.release(B, EX)
    assert (0, B, PR) in nodes.downs


def test_drop_and_leave() -> None:
    """Nothing remains at any master."""
    nodes = Nodes(2)
    zero, one = nodes.locks
    zero.acquire(A, EX)
    with pytest.raises(ValueError, match="in use"):
        zero.drop(A)
    zero.release(A, EX)
    zero.acquire(C, PR)
    zero.release(C, PR)
    zero.drop(b"never heard of")
    zero.leave()
    nodes.arrive()
    assert zero.manager.links.idle
    assert not zero.manager.locks
    assert not [*zero.manager.resources, *one.manager.resources]
    with pytest.raises(ValueError, match="not in use"):
        zero.release(A, EX)


def test_the_expelled_are_told() -> None:
    """And every acquire fails from then on."""
    nodes = Nodes(2)
    zero, _ = nodes.locks
    told = []
    zero.on_expelled = lambda: told.append(True)
    zero.acquire(A, EX)
    zero.manager.set_view(2, frozenset({1}))
    assert told
    with pytest.raises(OSError, match="web0 is not in the cluster any more"):
        zero.acquire(A, PR)
    with pytest.raises(OSError, match="web0 is not in the cluster any more"):
        zero.manager.lock(B, PR)
    zero.release(A, EX)
