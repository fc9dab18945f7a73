"""Two ends of a link under every order, loss and doubling of a few frames."""

from __future__ import annotations

import pytest

from fs.dlm.explore import Broken, Step, explore
from fs.dlm.links import RETRANSMIT_NS, WINDOW, Links
from fs.dlm.messages import Bast
from fs.dlm.modes import Mode
from fs.dlm.twin import Link, Twin
from tests.t3_fs.dlm.models import essence_of


class End:
    """Takes what comes, in the order in which the link gives it."""

    def __init__(self, twin: Twin, number: int) -> None:
        self.links = Links(number, twin.transport(number))
        self.got: list[bytes] = []
        twin.attach(number, self)

    def deliver(self, from_node: int, message: bytes) -> None:
        for each in self.links.receive(from_node, message):
            assert isinstance(each, Bast)
            self.got.append(each.name)
        self.links.acknowledge()


class LinkWorld:
    """End 0 sends some messages to end 1 on a network that may do a few bad things."""

    def __init__(self, messages: int, faults: int) -> None:
        self.twin = Twin()
        self.ends = [End(self.twin, number) for number in (0, 1)]
        self.faults = faults
        self.ticks = 0
        self.sent = [b"%d" % number for number in range(messages)]
        for end in self.ends:
            end.links.start(1, (0, 1))
        for name in self.sent:
            self.ends[0].links.post(1, Bast(name, Mode.NL))

    def steps(self) -> list[Step]:
        steps: list[Step] = []
        for link, queue in sorted(self.twin.queues.items()):
            for index in range(len(queue)):
                steps.append(("arrive", *link, index))
                if self.faults:
                    steps += [("lose", *link, index), ("double", *link, index)]
        if not self.ends[0].links.idle and not self.twin.queues:
            steps.append(("tick",))
        return steps

    def take(self, step: Step) -> None:
        match step:
            case ("tick",):
                self.ticks += 100 * RETRANSMIT_NS
                self.ends[0].links.tick(self.ticks)
            case (what, int(from_node), int(to_node), int(index)):
                self.faults -= what != "arrive"
                link = Link(from_node, to_node)
                if what == "lose":
                    self.twin.lose(link, index)
                else:
                    self.twin.arrive(link, index, keep=what == "double")

    def check(self) -> None:
        assert self.ends[1].got == self.sent[: len(self.ends[1].got)]

    def check_end(self) -> None:
        assert self.ends[1].got == self.sent

    def essence(self) -> object:
        ends = [essence_of(end.links) | {"got": end.got} for end in self.ends]
        for end in ends:
            end["_peers"] = [plain_peer(peer) for peer in end["_peers"].values()]  # type: ignore[attr-defined]
        queues = {link: sorted(queue) for link, queue in self.twin.queues.items()}
        return ends, queues, self.faults


def plain_peer(peer: object) -> dict[str, object]:
    """Without times, which count up for ever."""
    state = dict(vars(peer))
    state["under_way"] = [sent.sequence for sent in state["under_way"]]
    return state


def test_exactly_once_and_in_order() -> None:
    """Whatever is lost, doubled or overtaken."""
    seen = explore(LinkWorld(3, 2), states_max=20_000)
    print(f"3 messages, 2 faults: {seen}")
    assert seen.complete
    assert seen.states > 300


def test_a_link_that_takes_doubles_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test."""
    monkeypatch.setattr(
        Links, "_in_order", lambda self, peer, frame: [frame.message] if frame.message else []
    )
    with pytest.raises(Broken):
        explore(LinkWorld(2, 1), states_max=1000)


def test_frames_of_a_view_to_come_wait_but_not_without_bound() -> None:
    """Its sender was told sooner of the view."""
    twin = Twin()
    sender, receiver = End(twin, 0), End(twin, 1)
    receiver.links.start(1, (0, 1))
    sender.links.start(2, (0, 1))
    for number in range(WINDOW):
        sender.links.post(1, Bast(b"%d" % number, Mode.NL))
    sender.links.start(3, (0, 1))
    sender.links.post(1, Bast(b"too many", Mode.NL))
    while twin.queues:
        twin.arrive(Link(0, 1))
    assert receiver.got == []
    receiver.links.start(2, (0, 1))
    names = [
        message.name
        for _, messages in receiver.links.came_early()
        for message in messages
        if isinstance(message, Bast)
    ]
    assert names == [b"%d" % number for number in range(WINDOW)]


def test_a_peer_that_is_down_is_left_alone_until_it_is_up() -> None:
    """The hints of the transport."""
    twin = Twin()
    sender, receiver = End(twin, 0), End(twin, 1)
    for end in (sender, receiver):
        end.links.start(1, (0, 1))
    sender.links.post(1, Bast(b"x", Mode.NL))
    twin.lose(Link(0, 1))
    sender.links.peer_down(1)
    sender.links.tick(1000 * RETRANSMIT_NS)
    assert not twin.queues
    sender.links.peer_up(1)
    twin.arrive(Link(0, 1))
    assert receiver.got == [b"x"]
