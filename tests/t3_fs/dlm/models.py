"""Small worlds for `fs.dlm.explore`: one resource, a few nodes with something to do, and deaths.

`LockWorld` runs real lock managers on the deterministic network. Each node works through a list of
modes: it takes the lock, uses it, and keeps it until another wants it. `PageWorld` adds one page of
one file under the rule of the shared cleancache: a disk, a page in each node's memory, and a pool
that may drop its page at any time and to which an offer may come as late as it likes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fs.dlm.explore import Step
from fs.dlm.manager import LockManager
from fs.dlm.messages import VALUE_BYTES, Reason
from fs.dlm.modes import Mode, compatible
from fs.dlm.twin import Link, Twin

NAME = b"M0000000000000000000018feb14715"
OUTSIDE = {"_transport", "_events", "_now_ns", "_receivers", "retransmitted", "_world", "_twin"}
"""What is no state of a manager, a link or a node by itself."""


def essence_of(thing: object) -> dict[str, object]:
    """Attributes, without those that lead outside."""
    return {name: value for name, value in vars(thing).items() if name not in OUTSIDE}


class Node:
    """What a file system would be: wants the lock, uses it, gives it up when asked."""

    def __init__(self, world: LockWorld, number: int, wishes: Iterable[Mode]) -> None:
        self._world = world
        self.number = number
        self.wishes = list(wishes)
        self.manager = LockManager(number, world.twin.transport(number), self)
        world.twin.attach(number, self.manager)
        self.using: Mode | None = None
        self.again: Mode | None = None
        self.level: Mode | None = None
        self.view = 0
        self.page: int | None = None
        self.dirty = False

    @property
    def held(self) -> Mode:
        return self.manager.mode(NAME) or Mode.NL

    @property
    def asking(self) -> bool:
        lock = self.manager.locks.get(NAME)
        return lock is not None and lock.wanted is not None

    @property
    def idle(self) -> bool:
        return self.using is None and not self.asking and self.again is None

    def granted(self, name: bytes, mode: Mode) -> None:
        self._world.begins(self, mode)

    def denied(self, name: bytes, reason: Reason) -> None:
        assert reason == Reason.DEADLOCK
        self.again = Mode.EX

    def blocking(self, name: bytes, mode: Mode) -> None:
        if self.level is None or mode < self.level:
            self.level = mode

    def recovered(self, epoch: int) -> None:
        pass

    def expelled(self) -> None:
        raise AssertionError("a live member was expelled")

    def essence(self) -> object:
        manager = essence_of(self.manager)
        links = essence_of(manager.pop("links"))
        return essence_of(self) | {"manager": manager, "links": links}


class LockWorld:
    """Lock managers, and what may happen to them."""

    def __init__(
        self,
        wishes: Sequence[Sequence[Mode]],
        *,
        deaths: int = 0,
        joins: int = 0,
        late: bool = True,
    ) -> None:
        self.twin = Twin()
        self.views = [frozenset(range(len(wishes)))]
        self.deaths = deaths
        self.joins = joins
        self.value = 0
        """What the newest EX holder wrote."""
        self.newest_token = 0
        self.epoch_of_value = 0
        self.nodes: dict[int, Node] = {}
        for number, list_of_modes in enumerate(wishes):
            self.start(number, list_of_modes)
        for node in self.nodes.values():
            node.manager.set_view(1, self.views[0])
        while links := self.twin.ready():
            self.twin.arrive(links[0])

    def start(self, number: int, wishes: Iterable[Mode]) -> None:
        self.nodes[number] = Node(self, number, wishes)

    def steps(self) -> list[Step]:
        steps: list[Step] = [("arrive", *link) for link in self.twin.ready()]
        for number, node in self.nodes.items():
            if node.view < len(self.views) - 1:
                steps.append(("view", number))
            if node.using is not None:
                steps.append(("end", number))
            elif node.again is not None:
                steps.append(("again", number))
            elif node.idle and node.level is not None:
                steps.append(("down", number))
            elif node.idle and node.wishes:
                steps.append(("begin", number))
            if self.deaths and len(self.nodes) > 1:
                steps.append(("die", number))
        if self.joins and len(self.nodes) < 4:
            steps.append(("join",))
        return steps

    def take(self, step: Step) -> None:
        match step:
            case ("arrive", int(from_node), int(to_node)):
                self.twin.arrive(Link(from_node, to_node))
            case ("begin", int(number)):
                node = self.nodes[number]
                mode = node.wishes.pop(0)
                if node.held >= mode:
                    self.begins(node, mode)
                else:
                    node.manager.lock(NAME, mode)
            case ("end", int(number)):
                self.nodes[number].using = None
            case ("down", int(number)):
                self.gives_up(self.nodes[number], self.nodes[number].level or Mode.NL)
            case ("again", int(number)):
                node = self.nodes[number]
                mode = node.again or Mode.NL
                node.again = None
                self.gives_up(node, Mode.NL)
                node.manager.lock(NAME, mode)
            case ("view", int(number)):
                node = self.nodes[number]
                node.view += 1
                node.manager.set_view(node.view + 1, self.views[node.view])
            case ("die", int(number)):
                self.deaths -= 1
                self.dies(self.nodes.pop(number))
                self.twin.kill(number)
                self.views.append(frozenset(self.nodes))
            case ("join",):
                self.joins -= 1
                number = next(n for n in range(4) if n not in self.nodes)
                self.start(number, (Mode.EX, Mode.PR))
                self.views.append(frozenset(self.nodes))
                self.nodes[number].view = len(self.views) - 1
                self.nodes[number].manager.set_view(len(self.views), self.views[-1])
        self._acknowledge()

    def _acknowledge(self) -> None:
        """Acknowledgements commute with everything, so one moment stands for all."""
        for link, queue in list(self.twin.queues.items()):
            for index in reversed(range(len(queue))):
                if queue[index][3] == 0 and link.to_node in self.nodes:
                    self.twin.arrive(link, index)

    def begins(self, node: Node, mode: Mode) -> None:
        """The lock is in use from now on."""
        manager = node.manager
        node.using = mode
        token = manager.token(NAME)
        value = manager.value(NAME)
        fresh = node.held == Mode.EX
        assert token >= self.newest_token, f"token {token:#x} below {self.newest_token:#x}"
        if value is not None and any(value):  # zeros: nobody remembers that it was written
            assert int.from_bytes(value, "little") == self.value, "an old value"
        else:
            assert len(self.views) > 1 or not self.value, "a value was lost without a death"
        if fresh:
            self.newest_token = token
        if mode == Mode.EX:
            self.value += 1
            manager.set_value(NAME, self.value.to_bytes(VALUE_BYTES, "little"))
        elif mode == Mode.PR:
            assert node.held >= Mode.PR

    def gives_up(self, node: Node, to: Mode) -> None:
        """The lock is not in use, and another wants it."""
        if node.level is not None and to <= node.level:
            node.level = None
        if node.held > to:
            node.manager.down(NAME, to)

    def dies(self, node: Node) -> None:
        """A node is gone with all that it knew."""

    def check(self) -> None:
        modes = [node.held for node in self.nodes.values()]
        for position, mode in enumerate(modes):
            for other in modes[position + 1 :]:
                assert compatible(mode, other), f"{mode.name} beside {other.name}"

    def check_end(self) -> None:
        for node in self.nodes.values():
            assert node.manager.ready
            assert node.idle and not node.wishes, f"node {node.number} waits for ever"

    def essence(self) -> object:
        return (
            {number: node.essence() for number, node in self.nodes.items()},
            self.twin.queues,
            self.views,
            self.deaths,
            self.joins,
            self.value,
            self.newest_token,
        )


class Pool:
    """A shared pool with one page; `fenced` False is the pool of 2010, for the test of the test."""

    def __init__(self, *, fenced: bool) -> None:
        self.fenced = fenced
        self.page: int | None = None
        self.newest = 0

    def put(self, token: int, page: int) -> None:
        if token < self.newest and self.fenced:
            return
        self.newest = max(self.newest, token)
        self.page = page

    def flush(self, token: int) -> None:
        self.newest = max(self.newest, token)
        self.page = None


class PageWorld(LockWorld):
    """And one page of one file."""

    def __init__(
        self,
        wishes: Sequence[Sequence[Mode]],
        *,
        deaths: int = 0,
        joins: int = 0,
        fenced: bool = True,
        drops: bool = True,
    ) -> None:
        self.pool = Pool(fenced=fenced)
        self.drops = drops
        self.disk = 0
        self.written = 0
        """What a read has to return."""
        self.offers: dict[int, list[tuple[int, int]]] = {}
        super().__init__(wishes, deaths=deaths, joins=joins)

    def steps(self) -> list[Step]:
        steps = super().steps()
        steps += [("put", number) for number, offers in self.offers.items() if offers]
        if self.drops and self.pool.page is not None:
            steps.append(("drop",))
        return steps

    def take(self, step: Step) -> None:
        match step:
            case ("put", int(number)):
                self.pool.put(*self.offers[number].pop(0))
            case ("drop",):
                self.pool.page = None
            case _:
                super().take(step)

    def begins(self, node: Node, mode: Mode) -> None:
        super().begins(node, mode)
        token = node.manager.token(NAME)
        if node.page is None:
            node.page = self.disk if self.pool.page is None else self.pool.page
        assert node.page == self.written, f"read {node.page}, written was {self.written}"
        if mode == Mode.EX:
            if not node.dirty:
                # One node's calls stay in order.
                for offer in self.offers.pop(node.number, []):
                    self.pool.put(*offer)
                self.pool.flush(token)
            node.page = self.written = self.value
            node.dirty = True

    def gives_up(self, node: Node, to: Mode) -> None:
        if node.held > to and node.page is not None:
            if node.dirty:
                self.disk, node.dirty = node.page, False
            if node.held > Mode.NL:
                token = node.manager.token(NAME)
                self.offers.setdefault(node.number, []).append((token, node.page))
            if to == Mode.NL:
                node.page = None
        super().gives_up(node, to)

    def dies(self, node: Node) -> None:
        """What was not written back is lost; its offers may still come."""
        if node.dirty:
            self.written = self.disk

    def essence(self) -> object:
        pool = (self.pool.page, self.pool.newest)
        return super().essence(), pool, self.disk, self.written, self.offers
