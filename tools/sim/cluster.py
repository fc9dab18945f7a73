"""The simulated cluster: one machine, guests that come and go, and what happens next.

Events nest: while a call is late, other guests run, whose calls may be late too.  So calls overlap
as those of processes do, but for one order that can't be had: of two calls in flight the one that
was sent first can't be answered first.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from hypervisor.arena import Arena, format_arena
from hypervisor.auth import Grants
from hypervisor.balance import MODES
from hypervisor.eviction import POLICIES
from hypervisor.invariants import check
from hypervisor.machine import Machine
from hypervisor.pools import Settings
from hypervisor.recovery import recover
from ipc.abi import REQUEST, Op
from ipc.channel import Channel
from ipc.errors import Disconnected, OperatorError
from ipc.local import Fault, LocalChannel
from ipc.window import Window, anonymous_window
from tools.sim.administrator import Administrator
from tools.sim.faults import Faults
from tools.sim.ledger import Call, Ledger
from tools.sim.lives import GuestMaker, Killed, Life
from tools.sim.trace import Trace, describe

_NESTED_MAX: Final = 3
_ARENAS_BYTES: Final = (512 << 10, 640 << 10, 1 << 20, 2 << 20)
_DOWN_EVENTS_MAX: Final = 12
_KEY_MASK: Final = (1 << 63) - 1


class Cluster:
    """Everything of one seed.  `makers` says what lives in which guest; `emit` gets the lines."""

    def __init__(
        self,
        seed: int,
        makers: dict[str, GuestMaker],
        emit: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.random = random.Random(f"cluster {seed}")
        self.seed = seed
        self.makers = makers
        self.trace = Trace(emit)
        self.events = 0
        self.calls = 0
        self.restarts = 0
        self.deaths = 0
        self.evictions = 0
        self.seconds = 1000.0
        self.calendar_ns = 1_735_689_600_000_000_000
        rng = self.random
        self.faults = Faults(random.Random(f"faults {seed}"))
        self.policy = rng.choice(POLICIES)
        self.scheduling = rng.choice(MODES)
        self.arena_bytes = rng.choice(_ARENAS_BYTES)
        self.settings: dict[str, Settings] = {}
        self.grants = Grants()
        self.ledger = Ledger(self.grants, self.settings)
        self.lives: dict[str, Life] = {}
        self._lives_of = dict.fromkeys(makers, 0)
        self._pids = 100
        self._nested = 0
        self._start_at = 0
        self._mapping = mmap.mmap(-1, self.arena_bytes)
        format_arena(self._mapping)
        self.machine: Machine | None = None
        self.administrator = Administrator(self, random.Random(f"administrator {seed}"))
        self.note("-", f"policy={self.policy} scheduling={self.scheduling} {self.faults}")
        self.start()
        self.administrator.grant_all(list(makers))

    # --- time and what is seen of it

    def now_seconds(self) -> float:
        """The monotonic clock of everybody."""
        return self.seconds

    def clock_ns(self) -> int:
        """The calendar of the kernels; no two readings are equal."""
        self.calendar_ns += 1_000_000
        return self.calendar_ns

    def _now_ns(self) -> int:
        self.calendar_ns += 1000
        return self.calendar_ns

    def note(self, who: str, text: str, fault: str = "") -> None:
        """A line."""
        self.trace.add(self.events, who, text, self.machine, fault)

    # --- the hypervisor

    def start(self) -> None:
        """Start a hypervisor on the arena as it is; guests that died meanwhile are departed."""
        self.machine = machine = Machine(
            Arena(self._mapping),
            policy=self.policy,
            scheduling=self.scheduling,
            settings=self.settings,
            grants=self.grants,
            secret=self.seed.to_bytes(8, "little"),
            now_ns=self._now_ns,
            leaf_key=_leaf_key,
        )
        recover(machine)
        for client in list(machine.clients.values()):
            life = self.lives.get(client.name)
            if life is None or life.pid != client.pid:
                machine.depart(client)
                self.ledger.depart(client.name)
        self.note("hypervisor", f"start generation={machine.generation}")

    def crash(self) -> None:
        """The hypervisor dies; all channels break."""
        if self.machine is None:
            return
        self.evictions += self.machine.store.evictions
        self.scheduling = self.machine.balance.mode
        self.machine = None
        self.restarts += 1
        lost = self.faults.takes_arena()
        if lost:
            self._mapping = mmap.mmap(-1, self.arena_bytes)
            format_arena(self._mapping)
            self.ledger.forget_everything()
        for life in self.lives.values():
            if life.channel is not None:
                life.channel.sever()
                life.channel = None
        self._start_at = self.events + self.random.randrange(_DOWN_EVENTS_MAX)
        self.note("hypervisor", "crash, arena lost" if lost else "crash")

    def connect(self, life: Life) -> Channel:
        """As `ipc.attach.connect` does."""
        if life.dead:
            raise Killed
        machine = self.machine
        if machine is None:
            raise Disconnected("no hypervisor")
        client = machine.clients.get(life.name)
        resumed = client is not None and client.pid == life.pid
        if client is not None and not resumed:
            machine.depart(client)
            self.ledger.depart(life.name)
        if machine.attach(life.name, life.pid, life.pid, 0) is None:
            raise OperatorError("the guest table is full")
        if life.channel is not None:
            life.channel.sever()
        life.channel = LocalChannel(
            partial(self._execute, life),
            faults=self._faults_of(life),
            meanwhile=partial(self._meanwhile, life),
            generation=machine.generation,
            resumed=resumed,
        )
        self.note(str(life), "attach, resumed" if resumed else "attach")
        return life.channel

    def detach(self, life: Life, channel: Channel) -> None:
        """As `ipc.attach.detach` does: the pools go with the attachment."""
        channel.close()
        if life.channel is channel and self.machine is not None:
            self.machine.depart(self.machine.clients[life.name])
            self.ledger.depart(life.name)
            self.note(str(life), "detach")
            life.channel = None

    # --- calls

    def _faults_of(self, life: Life) -> Iterator[Fault]:
        while True:
            if life.dead:
                raise Killed
            if self.faults.kills_guest():
                self.kill(life)
                raise Killed
            life.fault = self.faults.of_call()
            if life.fault is Fault.LOSE_REQUEST:
                self.crash()
            yield life.fault

    def _execute(self, life: Life, request: bytes, window: Window) -> bytes:
        machine = self.machine
        assert machine is not None, "channels close with the machine"
        call = Call(request, window)
        message = machine.execute(machine.clients[life.name], request, window)
        self.calls += 1
        fault = life.fault
        reply = self.ledger.settle(life.name, call, message, window)
        told = "" if fault is Fault.NONE else fault.name.partition("_")[0]
        book = self.ledger.books.get(
            (life.name, call.pool if call.op != Op.NEW_POOL else reply.value)
        )
        self.note(str(life), describe(call, reply, book), told)
        life.last_reply = call, reply, [bytes(window.slot(entry[2])) for entry in call.entries]
        if fault is Fault.LOSE_REPLY:
            self.crash()
        return message

    def _meanwhile(self, life: Life) -> None:
        """A call of this guest is late: others go first."""
        if self._nested < _NESTED_MAX:
            self._nested += 1
            life.in_call += 1
            try:
                for _ in range(self.random.randrange(1, 5)):
                    self.step()
            finally:
                life.in_call -= 1
                self._nested -= 1
        if life.dead:
            raise Killed

    # --- events

    def step(self) -> None:
        """One thing that a guest, the administrator or fate does, and a look at everything."""
        self.events += 1
        rng = self.random
        self.seconds += rng.choice((0.0, 0.0, 0.05, 0.3))
        if self.machine is None and self.events >= self._start_at:
            self.start()
        elif self.faults.kills_hypervisor():
            self.crash()
        else:
            choice = rng.random()
            if choice < 0.05 and self.machine is not None:
                self.administrator.act()
            elif choice < 0.10 and self.machine is not None:
                self._idle(self.machine)
            else:
                self._run_guest(rng.choice(list(self.makers)))
        self.check()

    def check(self) -> None:
        """All that must hold between two calls."""
        if self.machine is not None:
            check(self.machine)
            self.ledger.audit(self.machine)

    def _idle(self, machine: Machine) -> None:
        rng = self.random
        store = machine.store
        choice = rng.randrange(4)
        if choice == 0:
            done = store.reap(rng.randrange(1, 60))
            what = "reap"
        elif choice == 1:
            done = store.contents.compact(rng.randrange(1, 40))
            what = "compact"
        elif choice == 2:
            done = store.contents.recompress(store.sequence, rng.randrange(50), 8)
            what = "recompress"
        else:
            machine.balance.retarget()
            done = 0
            what = "retarget"
        self.note("idle", f"{what:<7} {done}")

    def _run_guest(self, name: str) -> None:
        life = self.lives.get(name)
        if life is None:
            self._give_birth(name)
            return
        if life.in_call:
            return
        if self.faults.kills_guest():
            self.kill(life)
            return
        assert life.guest is not None
        life.in_call += 1
        try:
            life.guest.step()
        except Killed:
            pass
        finally:
            life.in_call -= 1
        if life.dead:
            life.guest.bury()

    def _give_birth(self, name: str) -> None:
        self._lives_of[name] += 1
        self._pids += 1
        number = self._lives_of[name]
        life = self.lives[name] = Life(name, number, self._pids)
        self.note(str(life), "born")
        rng = random.Random(f"{name} {number} {self.seed}")
        life.in_call += 1
        try:
            life.guest = self.makers[name](self, life, rng)
        except Killed:
            pass
        finally:
            life.in_call -= 1

    def kill(self, life: Life) -> None:
        """A guest dies now, wherever it is; the hypervisor sees its process end."""
        life.dead = True
        self.deaths += 1
        self.note(str(life), "dies in a call" if life.in_call else "dies")
        if life.channel is not None:
            life.channel.sever()
            life.channel = None
        del self.lives[life.name]
        machine = self.machine
        client = machine.clients.get(life.name) if machine is not None else None
        if machine is not None and client is not None and client.pid == life.pid:
            machine.depart(client)
            self.ledger.depart(life.name)
        if not life.in_call and life.guest is not None:
            life.guest.bury()

    # --- the end

    def finish(self) -> None:
        """Quiet: everybody reads all persistent pages and exits; nothing may be left."""
        self.faults.late = self.faults.lost = self.faults.death = 0.0
        if self.machine is None:
            self.start()
        machine = self.machine
        assert machine is not None
        self._read_back(machine)
        for life in list(self.lives.values()):
            assert life.guest is not None
            life.guest.end()
            life.guest.bury()
            client = machine.clients.get(life.name)
            if client is not None:
                machine.depart(client)
                self.ledger.depart(life.name)
            self.check()
        while machine.store.doomed:
            machine.store.reap()
        self.check()
        self.evictions += machine.store.evictions
        used = machine.store.frames.count - machine.store.frames.free
        if used:
            raise AssertionError(f"{used} frames are in use though nobody is here")

    def abandon(self) -> None:
        """Give back what is outside of Python's reach, whatever has happened."""
        for life in self.lives.values():
            if life.guest is not None:
                life.guest.bury()

    def _read_back(self, machine: Machine) -> None:
        window = anonymous_window()
        for guest, pool, (oid, index) in self.ledger.persistent_pages():
            request = REQUEST.pack(1, Op.GET_PAGE, 0, 1, pool, index, oid, 0, 0, 0)
            call = Call(request, window)
            message = machine.execute(machine.clients[guest], request, window)
            self.ledger.settle(guest, call, message, window)


def _leaf_key(oid: bytes, leaf_number: int) -> int:
    """The same in every process: hashes of integers do not depend on Python's hash seed."""
    return hash((int.from_bytes(oid, "little"), leaf_number)) & _KEY_MASK
