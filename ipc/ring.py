"""The ring: calls through two blocks in the window; the queues only wake who sleeps.

A guest asks for it in HELLO and has it if WELCOME says so.  It may then make a call in either way,
one call at a time: with a REQUEST on its request queue, or with one in the CALL_BLOCK of its
window, which is answered in the COMPLETION_BLOCK.  With a ring a KICK, from either side, says
"look at the other's block".

  guest                                        hypervisor
  (the last call is completed)
  request; posted := posted + 1                reads posted: not the one it saw last, so a call
  sleeping of the hypervisor? KICK  ---------> copies request once, executes it
  until completed = posted:                    reply; completed := the posted that it read
    yields the processor, 50 times   <-------- sleeping of the guest? KICK
    sleeping := 1; fence; completed?           yields; no other call?
    sleeping of the hypervisor? KICK           sleeping of the guest? KICK
    sleeps in the reply queue; sleeping := 0

Rules, for both sides and any language

* R1  Each word has one writer.  It is aligned and written by one store of 8 bytes, after all that
  it announces: request and window before `posted`, window and reply before `completed` (a release
  store in C11).  It is read before what it announces (an acquire load).
* R2  Between its store of `posted` (of `completed`) and its last load of the other's `sleeping`,
  and between its store of 1 to its own `sleeping` and its last look at the other's word, a side has
  a full fence, which orders a store before a load: atomic_thread_fence(memory_order_seq_cst) in
  C11.  Without it both can look too early, and both sleep.
* R3  A guest that left a call waits for it to complete before it makes the next one: the block may
  be being copied.  After a call that it left in the queue it makes the next one there too.
* R4  A sleeper can be woken without need, so it looks again.  A KICK that finds the queue full is
  dropped: what fills the queue wakes as well.
* R5  The hypervisor believes nothing that stands in the window: it reads no word of its own back,
  copies `request` once, and takes any change of `posted` for one call.  So a call block is a
  request queue of one message: whatever a guest writes there costs it what a call costs, and
  nothing fills up if it does not read.

In Python a fence is the acquiring and releasing of a lock, each an atomic operation, and R1 holds
where stores and loads keep their order by themselves: on x86-64.  Elsewhere a hypervisor in Python
grants nobody a ring, and a guest in Python asks for none.  Each end has a lock of its own and never
waits for it: an exception of a signal handler may leave it locked, and the release is fence enough.
To yield is a fence too, as the kernel takes the lock of a run queue.  So on the way of a call that
finds the other side awake there is no other fence: a first look at `sleeping` comes at once, and
whoever finds 0 there looks again when it has yielded in vain.

To yield is quick on an idle core and on one that the other side shares; beside somebody who
computes it costs a time slice, a thousand times a call.  So each side times its yields.  After a
slow one the guest makes its next 32 calls through the queues, and the hypervisor sleeps at once
after as many; after the next slow one 64, and so on (`BackOff`).  As timing costs a guest 2 % of a
call, it times only one call in eight when none of the last 4096 had a slow yield.

To look is worth it only if the next call comes soon.  Each time the hypervisor looks in vain it
will look half as long the next time, in the end not at all; as soon as a guest rings that looking
would have found, it looks as long as it may (so does the halt polling of Linux's KVM).
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
import threading
from collections.abc import Callable
from time import perf_counter_ns as now_ns
from typing import Final, Generic, TypeVar

import posix_ipc

from ipc.errors import Disconnected
from ipc.limits import (
    BACK_OFF_CALLS_MAX,
    BACK_OFF_CALLS_MIN,
    PATIENCE_SECONDS,
    SLOW_YIELD_NS,
    SOON_NS,
    STRETCH_NS,
    YIELDS_MAX,
)
from ipc.mqueue import KICK, QueueChannel, QueuePair
from ipc.names import Registry
from ipc.window import Window

_YIELDS: Final = range(YIELDS_MAX)
_UNTIMED: Final = 7
"""In quiet times yields are timed in calls whose number has none of these bits."""
_yield: Final = os.sched_yield


def memory_order_suffices(machine: str | None = None) -> bool:
    """Whether plain stores and loads of this process keep the order that a ring needs."""
    return (machine or platform.machine()) == "x86_64" and sys.maxsize > 1 << 32


class BackOff:
    """Whether to yield: `left` calls do without it."""

    __slots__ = ("_calls", "calm_from", "left")

    def __init__(self) -> None:
        self._calls = BACK_OFF_CALLS_MIN
        self.calm_from = BACK_OFF_CALLS_MAX
        """With so many calls that did not do without, slow yields are forgotten."""
        self.left = 0

    def slow(self, number: int) -> None:
        """A yield was slow; so far there were `number` calls that did not do without."""
        if number >= self.calm_from:
            self._calls = BACK_OFF_CALLS_MIN
        self.calm_from = number + BACK_OFF_CALLS_MAX
        self.left = self._calls
        self._calls = min(2 * self._calls, BACK_OFF_CALLS_MAX)


class RingPair(QueuePair):
    """The hypervisor's end (a `Port`)."""

    def __init__(
        self,
        cluster: str,
        registry: Registry,
        window: Window,
        random_bytes: Callable[[int], bytes],
        uid: int | None = None,
    ) -> None:
        super().__init__(cluster, registry, window, random_bytes, uid)
        self.seen = 0
        """The last `posted` that was taken for a call."""
        self.mark = 0
        """`seen` at an earlier time; for whoever wants to know whether the guest called since."""
        self.came_by_queue = False
        """The call that is being served."""
        self.unsure = False
        """The guest seemed to be awake when it was answered last, and there was no fence."""
        self.untrusted_words = window.call_words
        self.copy_untrusted_request = window.request.tobytes
        self._words = window.completion_words
        self._reply = window.reply
        lock = threading.Lock()
        self._acquire, self._release = lock.acquire, lock.release
        self.asleep = False
        self.sleep()

    def sleep(self) -> None:
        """The guest must ring from now on; whoever says so looks once more."""
        self.asleep = True
        self._words[1] = 1
        self._acquire(False)
        self._release()

    def wake(self) -> None:
        """The guest need not ring: its calls will be looked for."""
        self.asleep = False
        self._words[1] = 0

    def look(self) -> bytes | None:
        """The request of a call that was posted since the last look, or None."""
        posted = self.untrusted_words[0]
        if posted == self.seen:
            return None
        self.seen = posted
        return self.copy_untrusted_request()

    def receive(self) -> bytes | None:
        message = super().receive()
        if message is None:
            return self.look()
        self.came_by_queue = True
        return message

    def wait(self, patience_seconds: float | None = None) -> bytes | None:
        message = super().wait(patience_seconds)
        if message is None:
            return self.look()
        self.came_by_queue = True
        return message

    def send(self, reply: bytes) -> bool:
        if self.came_by_queue:
            self.came_by_queue = False
            return super().send(reply)
        self._reply[:] = reply
        self._words[0] = self.seen
        if self.untrusted_words[1]:
            super().send(KICK)
        elif self.asleep:
            self._acquire(False)
            self._release()
            self.make_sure()
        else:
            self.unsure = True
        return True

    def make_sure(self) -> None:
        """Wake the guest if it sleeps; there was a fence since it was answered."""
        self.unsure = False
        if self.untrusted_words[1]:
            super().send(KICK)


class RingChannel(QueueChannel):
    """The guest's end (a `Channel`).  A message that is no whole request goes through the queue."""

    def __init__(
        self,
        request_queue: posix_ipc.MessageQueue,
        reply_queue: posix_ipc.MessageQueue,
        window: Window,
        door: socket.socket,
        generation: int,
        resumed: bool,
    ) -> None:
        super().__init__(request_queue, reply_queue, window, door, generation, resumed)
        self._words = window.call_words
        self._request = window.request
        self._their_words = window.completion_words
        self._copy_reply = window.reply.tobytes
        lock = threading.Lock()
        self._acquire, self._release = lock.acquire, lock.release
        self._back_off = BackOff()
        self._ready = True
        """The next call can be made in the block, and the last one there was completed."""
        self._left_in_queue = False
        """A call was made in the queue and not seen to its end."""

    def call(self, request: bytes) -> bytes:
        if not self._ready and not self._recover():
            return self._call_through_queue(request)
        try:
            self._request[:] = request
        except ValueError:
            # It has another length.
            return self._call_through_queue(request)
        # Whatever cuts this call short, the next one begins with `_recover`.
        self._ready = False
        words = self._words
        their_words = self._their_words
        words[0] = posted = words[0] + 1
        rung = their_words[1]
        if rung:
            self._ring()
        if posted & _UNTIMED and posted >= self._back_off.calm_from:
            _yield()
            if their_words[0] == posted:
                self._ready = True
                return self._copy_reply()
        before = now_ns()
        for _ in _YIELDS:
            _yield()
            moment = now_ns()
            if moment - before > SLOW_YIELD_NS:
                self._back_off.slow(posted)
                self._sleep(posted, rung)
                break
            if their_words[0] == posted:
                self._ready = True
                break
            before = moment
        else:
            self._sleep(posted, rung)
        return self._copy_reply()

    def _recover(self) -> bool:
        """Whether the next call can be made in the block; one that was cut short there is waited
        for, in whatever state that left it."""
        if self._closed:
            raise Disconnected("the channel is closed")
        posted = self._words[0]
        if self._their_words[0] != posted:
            self._ring()
            self._sleep(posted, 1)
        return not self._back_off.left and not self._left_in_queue

    def _call_through_queue(self, request: bytes) -> bytes:
        self._ready = False
        self._left_in_queue = True
        reply = super().call(request)
        self._left_in_queue = False
        if self._back_off.left:
            self._back_off.left -= 1
        return reply

    def _ring(self) -> None:
        with contextlib.suppress(posix_ipc.BusyError):
            self._requests.send(KICK, 0)

    def _sleep(self, posted: int, rung: int) -> None:
        """Block until a call is completed; raises Disconnected.  If it was not `rung` for, the
        hypervisor may have gone to sleep since."""
        words, their_words = self._words, self._their_words
        try:
            while their_words[0] != posted:
                words[1] = 1
                self._acquire(False)
                self._release()
                if their_words[0] == posted:
                    break
                if not rung and their_words[1]:
                    self._ring()
                    rung = 1
                try:
                    self._receive(PATIENCE_SECONDS)
                except posix_ipc.BusyError:
                    if self.hypervisor_is_gone():
                        raise Disconnected("the hypervisor is gone") from None
                except posix_ipc.SignalError:
                    continue
        finally:
            words[1] = 0

    def close(self) -> None:
        self._ready = False
        super().close()


Caller = TypeVar("Caller")


class Rings(Generic[Caller]):
    """The hypervisor's side of many rings: which guests called lately and need not ring.

    `serve(caller, message, moment)` executes a call that was found at `moment` (ns) and returns the
    time when it was answered.
    """

    def __init__(self, serve: Callable[[Caller, bytes, int], int]) -> None:
        self.watched: list[tuple[RingPair, Caller]] = []
        self._serve = serve
        self._back_off = BackOff()
        self._rounds = 0
        self._fruitless = 0
        self._patience = YIELDS_MAX
        self._rested_ns = -SOON_NS
        """When it was last that nobody was looked for any more."""

    def watch(self, pair: RingPair, caller: Caller, rang_ns: int) -> None:
        """This guest rang at that time and was served: from now on its calls are looked for, unless
        yields are slow or looking was in vain lately."""
        if self._back_off.left:
            self._back_off.left -= 1
            return
        if rang_ns - self._rested_ns < SOON_NS:
            self._patience = YIELDS_MAX
        if not self._patience:
            self._rested_ns = now_ns()
        elif pair.asleep:
            pair.wake()
            pair.mark = -1
            self.watched.append((pair, caller))

    def forget(self, pair: RingPair) -> None:
        """The pair is being closed."""
        self.watched = [entry for entry in self.watched if entry[0] is not pair]

    def spin(self, rounds: int) -> None:
        """Rounds of one look at each guest and one yield; ends early when the calls took long, and
        rests when nobody has called for long or a yield was slow."""
        serve = self._serve
        watched = self.watched
        moment = now_ns()
        end = moment + STRETCH_NS
        for _ in range(rounds):
            called = False
            for pair, caller in watched:
                posted = pair.untrusted_words[0]
                if posted != pair.seen:
                    pair.seen = posted
                    moment = serve(caller, pair.copy_untrusted_request(), moment)
                    called = True
                elif pair.unsure:
                    pair.make_sure()
            if called:
                self._rounds += 1
                self._fruitless = 0
                self._patience = YIELDS_MAX
            elif self._fruitless < self._patience:
                self._fruitless += 1
            else:
                self._patience //= 2
                self.rest()
                return
            before = moment
            _yield()
            moment = now_ns()
            if moment - before > SLOW_YIELD_NS:
                self._back_off.slow(self._rounds)
                self.rest()
                return
            if moment > end:
                # Others have been waiting: those who call through queues, or ask to attach.
                return

    def rest(self) -> None:
        """Let all guests ring from now on; serve who called just before."""
        watched, self.watched = self.watched, []
        self._fruitless = 0
        self._rested_ns = now_ns()
        for entry in watched:
            self._dismiss(*entry)

    def part_with_idlers(self) -> None:
        """Let those ring that have not called since this was called last."""
        for pair, caller in self.watched.copy():
            if pair.seen != pair.mark:
                pair.mark = pair.seen
                continue
            self.forget(pair)
            self._dismiss(pair, caller)

    def _dismiss(self, pair: RingPair, caller: Caller) -> None:
        pair.sleep()
        pair.make_sure()
        message = pair.look()
        if message is not None:
            self._serve(caller, message, now_ns())
