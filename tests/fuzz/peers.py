"""What one node of a volume can send to another, whatever it makes up.

`locks`    frames of the lock manager: any bytes, and whole managers of three nodes whose two
           others answer with frames that are right more often than not.  A frame that is decoded
           says the same when it is encoded and decoded again, and what a peer can make a manager
           remember is bounded.  When all others have gone, the node can lock what it likes.
`ranges`   questions and answers about locked byte ranges.

A node that lies within the rules is believed (`hypervisor/SECURITY.md`): only what can't be is a
finding here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from fs.dlm import codec
from fs.dlm.links import WINDOW
from fs.dlm.manager import LockManager
from fs.dlm.messages import (
    TOKEN_MAX,
    VALUE_BYTES,
    Bast,
    Cancel,
    Claim,
    Death,
    Deny,
    Done,
    Down,
    Flag,
    Grant,
    Grave,
    Lift,
    Lifted,
    Member,
    Message,
    Reason,
    Record,
    Release,
    Request,
)
from fs.dlm.modes import Mode
from fs.filelocks import END, RANGES_MAX, RangeLock
from fs.hooks import FileKey
from guests import rangequeries
from guests.rangequeries import RangeQueries
from tests.fuzz.reading import Reader, hold
from tests.support.messages import lock_frame_is_taken

STEPS_MAX: Final = 120
_NODES_MAX: Final = 255
_NAMES: Final = (b"M1", b"W1", b"N2", b"S0", b"x" * 64)
_EPOCHS: Final = (1, 2, 2, 3, 4, 2**32, 2**63, 2**64 - 1)
_TOKENS: Final = (0, 1, 2**32, 2 * 2**32 + 1, TOKEN_MAX - 1, TOKEN_MAX)
_MODES: Final = (*Mode, None)


# --- locks


def fuzz_locks(data: bytes) -> None:
    """The first byte chooses: bytes for the codec, or steps of a manager and its peers."""
    if not data or data[0] % 4 == 0:
        lock_frame_is_taken(data[1:])
    else:
        _Manager(Reader(data[1:])).run()


class _Manager:
    """Node 1's manager, and what nodes 0, 2 and 3 say to it; nothing is really sent."""

    node: Final = 1

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._manager = LockManager(self.node, self, self)
        self._sequence: dict[int, int] = {}
        self._manager.set_view(1, frozenset((0, 1, 2)))

    # LockTransport and LockEvents

    def send(self, to_node: int, message: bytes) -> None:
        hold(to_node != self.node, "a message to itself on the wire")
        codec.decode(message)

    def granted(self, name: bytes, mode: Mode) -> None:
        hold(self._manager.mode(name) == mode, "a grant of another mode")

    def denied(self, name: bytes, reason: Reason) -> None:
        pass

    def blocking(self, name: bytes, mode: Mode) -> None:
        pass

    def recovered(self, epoch: int) -> None:
        hold(epoch == self._manager.epoch, "recovered for another epoch")

    def expelled(self) -> None:
        hold(not self._manager.locks, "locks of an expelled node")

    def run(self) -> None:
        """All steps."""
        for _ in range(STEPS_MAX):
            if self._reader.left <= 0 or self._manager.expelled:
                break
            self._step()
            self._check()
        if not self._manager.expelled:
            self._be_alone()

    def _be_alone(self) -> None:
        """The others have gone, all journals are replayed: nothing that was said is waited for."""
        manager = self._manager
        manager.set_view(manager.epoch + 1, frozenset({self.node}))
        for node in range(_NODES_MAX):
            manager.release_dead(node)
        hold(not manager.held, "a journal that nobody can replay")
        hold(manager.ready, "a recovery that never ends")
        for name, lock in list(manager.locks.items()):
            hold(lock.wanted is None, f"{name!r} is waited for in vain")
        manager.lock(b"fresh", Mode.EX)
        hold(manager.mode(b"fresh") == Mode.EX, "a lock of nobody is not granted")

    def _check(self) -> None:
        links = self._manager.links
        for peer in links._peers.values():
            hold(len(peer.early) <= WINDOW, "too many early frames are kept")
        for waiting in links._to_come.values():
            hold(len(waiting) <= WINDOW, "too many frames of views to come are kept")

    def _step(self) -> None:
        control = self._reader.byte()
        kind = control & 7
        peer = (0, 2, 3)[(control >> 3) % 3]
        if kind == 0:
            self._manager.deliver(peer, self._reader.take(self._reader.byte()))
        elif kind == 1:
            self._use()
        elif kind == 2:
            self._new_view()
        else:
            self._deliver(peer, odd=control >> 6 == 3)

    def _deliver(self, peer: int, *, odd: bool) -> None:
        """A whole frame, most often the next of its stream."""
        epoch = _EPOCHS[self._reader.byte() & 7] if odd else self._manager.epoch
        sequence = self._sequence.get(peer, 0) + 1 + (self._reader.byte() if odd else 0)
        kind, body = codec.encode(self._message())
        frame = bytearray(codec.encode_frame(epoch, sequence, 2**63 * odd, kind, body))
        if odd:
            place = self._reader.byte() % len(frame)
            frame[place] ^= self._reader.byte()
        else:
            self._sequence[peer] = sequence
        lock_frame_is_taken(bytes(frame))
        self._manager.deliver(peer, bytes(frame))

    def _message(self) -> Message:
        reader = self._reader
        which, choice = reader.take(2)
        name = _NAMES[choice % len(_NAMES)]
        mode = tuple(Mode)[choice >> 3 & 3 if choice >> 3 & 3 < len(Mode) else 0]
        request = reader.byte() % 4
        token = _TOKENS[choice % len(_TOKENS)]
        value = bytes(VALUE_BYTES) if choice & 64 else None
        flags = Flag(request)
        match which % 13:
            case 0:
                return Request(name, request, mode, flags)
            case 1:
                return Cancel(name, request)
            case 2:
                return Down(name, mode, bool(choice & 32), value)
            case 3:
                return Grant(name, request, mode, token, value)
            case 4:
                return Deny(name, request, tuple(Reason)[choice % len(Reason)])
            case 5:
                return Bast(name, mode)
            case 6:
                exclusive = (None, 0, 1, 2, 3, 254)[request]
                return Record(name, token, choice, exclusive, value, self._deaths())
            case 7:
                granted, wanted = (_MODES[byte % len(_MODES)] for byte in reader.take(2))
                return Claim(name, granted, wanted, request, flags, token, value)
            case 8:
                return Release(Death(request, _EPOCHS[choice & 7]))
            case 9:
                return Lift(name, token)
            case 10:
                return Lifted(name, token)
            case _:
                return self._done(choice)

    def _deaths(self) -> frozenset[Death]:
        count = self._reader.byte() % 3
        return frozenset(Death(node % 5, _EPOCHS[node >> 5]) for node in self._reader.take(count))

    def _done(self, choice: int) -> Done:
        members = tuple(Member(node, _EPOCHS[choice & 7]) for node in range(1 + choice % 4))
        graves = [
            Grave(frozenset({choice & 3}), frozenset({0, 1, 2}), self._deaths())
        ] * (choice >> 6 & 1)  # fmt: skip
        before = self._manager.epoch - 1 if choice & 32 else _EPOCHS[choice & 7]
        ready, token = bool(choice & 16), _TOKENS[choice % len(_TOKENS)]
        return Done(
            before, ready, token, members, self._deaths(), self._deaths(), frozenset(graves)
        )

    def _use(self) -> None:
        """What the node itself does, as far as it may."""
        choice = self._reader.byte()
        name = _NAMES[choice % len(_NAMES)]
        manager = self._manager
        lock = manager.locks.get(name)
        if lock is None or lock.granted is None or lock.wanted is not None:
            if choice & 128 and lock is not None:
                manager.cancel(name)
            elif lock is None:
                manager.lock(name, tuple(Mode)[choice >> 4 & 1 or 2], Flag(choice >> 5 & 3))
        elif choice & 128:
            manager.unlock(name)
        elif choice & 64:
            manager.lift(name, _TOKENS[choice % len(_TOKENS)])
        elif choice & 32 and lock.granted == Mode.EX:
            manager.set_value(name, bytes([choice]) * VALUE_BYTES)
        elif choice & 16 and lock.granted < Mode.EX:
            manager.lock(name, Mode.EX, Flag(choice >> 3 & 1))
        else:
            manager.down(name, Mode.NL)

    def _new_view(self) -> None:
        choice = self._reader.byte()
        if choice & 128:
            if choice & 64:
                (self._manager.peer_down if choice & 32 else self._manager.peer_up)(choice & 3)
            self._manager.tick(self._reader.byte() << 24)
            return
        members = frozenset(node for node in (0, 2, 3) if choice >> node & 1)
        dead = self._manager.members - members - {self.node}
        for node in dead:
            if choice & 16:
                self._manager.hold(node)
        self._sequence.clear()
        self._manager.set_view(self._manager.epoch + 1, members | {self.node})
        if choice & 32:
            for node in sorted(self._manager.held):
                self._manager.release_dead(node)


# --- ranges

_FILE: Final = FileKey(77, 3)


class _Answerers:
    """A node that asks and is asked; what comes, comes from the bytes."""

    def __init__(self, data: bytes) -> None:
        self._reader = Reader(data)
        self._sent: list[tuple[int, bytes]] = []
        self._waits = 0
        self._now_ns = 0
        self._queries = RangeQueries(
            0,
            send=lambda node, message: self._sent.append((node, message)),
            members=self._members,
            wait=self._wait,
            now_ns=lambda: self._now_ns,
        )
        self._queries.own = self._own

    def _members(self) -> Collection[int]:
        # Whoever has not answered until the bytes have run out is dead.
        return (0, 1, 2) if self._reader.left > 0 and self._waits < STEPS_MAX else (0,)

    @staticmethod
    def _own(ino: int, generation: int) -> Sequence[RangeLock]:
        known = (ino, generation) == (_FILE.ino, _FILE.generation)
        return [RangeLock(n, END, bool(n & 1), n - 1) for n in range(RANGES_MAX * known)]

    def _wait(self) -> None:
        self._waits += 1
        reader = self._reader
        control = reader.byte()
        self._now_ns += control << 22
        node = control % 4
        before = len(self._sent)
        match control >> 2 & 3:
            case 0:
                self._queries.deliver(node, reader.take(reader.byte()))
            case 1:
                question = rangequeries._QUESTION.pack(0, reader.byte(), *_FILE)
                self._queries.deliver(node, question)
                hold(len(self._sent) == before + 1, "a question without an answer")
            case _:
                head = rangequeries._ANSWER.pack(1, 1 + reader.byte() % 2)
                count = reader.byte() % 4 if control < 250 else RANGES_MAX + 1
                parts = [
                    rangequeries._RANGE.pack(*self._range(reader.byte())) for _ in range(count)
                ]
                tail = reader.take(control >> 4 & 1)
                self._queries.deliver(node, head + b"".join(parts) + tail)
        hold(len(self._sent) <= before + 1, "one message, several answers")

    @staticmethod
    def _range(choice: int) -> tuple[int, int, bool, int]:
        start, end = ((0, 1), (5, END), (9, 9), (END, END + 1))[choice & 3]
        return start, end, bool(choice & 4), (choice >> 3) - 4

    def run(self) -> None:
        """Two rounds of questions."""
        for _ in range(2):
            for lock in self._queries.ask(_FILE, None):
                hold(0 <= lock.start < lock.end <= END, "a range that can't be")
                hold(lock.node in (1, 2), "a range of nobody that was asked")


def fuzz_ranges(data: bytes) -> None:
    """One world."""
    _Answerers(data).run()
