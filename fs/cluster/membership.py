"""Agreed membership: all live nodes go through the same views in the same order.

The disk says who is alive (`heartbeat`), messages make the nodes agree. Linux's o2cb has no views:
each node acts on its own heartbeat, and o2dlm agrees on a domain's members with messages of its
own. A lock manager that re-masters by a rule needs one list, so here is one.

The coordinator is the lowest live member. For the view of epoch e + 1 it
  1. takes the reservations of the members that died (no write of theirs comes after that);
  2. asks all live members of e, and those who join, to promise (PREPARE, PROMISE);
  3. proposes a view: one that a participant had accepted already, else its own (ACCEPT, ACCEPTED);
  4. when all live members of that view have accepted it, writes the epoch into its own heartbeat
     sector, installs the view and sends it (VIEW, INSTALLED).
Each step is Paxos, except that a quorum is every live member and not a majority: o2cb lets one node
of two go on alone, because the disk told it that the other is dead.

Why one epoch never has two views. Two quorums with a live node in common: Paxos. Two quorums
without one: each side took the other for dead, so each took the other's reservations in step 1
before it wrote its sector in step 4, and the later of the two can't write. The same holds for the
first view of a cluster, whose quorum is every node that beats; a node that was seen on the disk,
doesn't beat and did not leave loses its reservation first.

Messages may be lost, late, doubled and reordered: what is not answered is sent again by `tick`, an
answer counts for its ballot only, and a message of an incarnation that doesn't beat is dropped.

Invariants:
  M1  two nodes that installed a view of one epoch installed the same view;
  M2  epochs grow; a member of view e that lives goes through e + 1 before e + 2;
  M3  a node is left out of a view only if it asked to leave, or is dead and can't write any more;
  M4  a node that finds itself left out, without having asked, is fenced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from fs.cluster.agreement import Attempt, Voter
from fs.cluster.config import Timing, node_label
from fs.cluster.messages import MAX_ROUND, Kind, Message, decode, encode
from fs.cluster.view import NO_BALLOT, Ballot, View, make_view


class Witness(Protocol):
    """What membership needs to know of the disk, and may do to it."""

    def live(self) -> dict[int, int]:
        """Nodes that beat, with generations; this node too once it is steady."""
        ...

    def claims(self) -> Mapping[int, frozenset[int]]:
        """What each live node is a member of, as its sector says."""
        ...

    def unclean(self) -> dict[int, int]:
        """Nodes that don't beat and did not leave."""
        ...

    def starting(self) -> bool:
        """Whether a node that is not live yet was seen to beat."""
        ...

    def highest_epoch(self) -> int:
        """The highest epoch on the disk."""
        ...

    def preempt(self, node: int, generation: int) -> bool:
        """Take a reservation; True when no write of that incarnation can come any more."""
        ...

    def publish(self, epoch: int, members: frozenset[int]) -> bool:
        """Write what this node is a member of into its sector."""
        ...

    def fenced(self) -> bool:
        """Whether this node is fenced."""
        ...


class Outcome(Protocol):
    """What membership tells its node."""

    def installed(self, view: View, dead: frozenset[int]) -> None:
        """A view was agreed; `dead` are members of the last one that did not leave."""
        ...

    def excluded(self, reason: str) -> None:
        """The others went on without this node."""
        ...

    def gone(self) -> None:
        """This node has left."""
        ...

    def refused(self, reason: str) -> None:
        """This node may not join."""
        ...


def admit_all(node: int) -> bool:  # noqa: ARG001
    """Any node that asks may join."""
    return True


class Membership:
    """The part of one node in the agreement."""

    def __init__(
        self,
        node: int,
        generation: int,
        *,
        timing: Timing,
        witness: Witness,
        outcome: Outcome,
        send: Callable[[int, bytes], None],
        names: dict[int, str] | None = None,
        admits: Callable[[int], bool] = admit_all,
    ) -> None:
        self.node = node
        self.generation = generation
        self.view: View | None = None
        self.leaving = False
        self.stopped = False
        self.malformed = 0
        self._timing = timing
        self._witness = witness
        self._outcome = outcome
        self._send_bytes = send
        self._names = names or {}
        self._admits = admits
        self._voter = Voter()
        self._attempt: Attempt | None = None
        self._round = 0
        self._joiners: dict[int, int] = {}
        self._leavers: dict[int, int] = {}
        self._uninformed: dict[int, int] = {}
        self._resend_at_ns = 0
        self._handlers: dict[Kind, Callable[[int, Message], None]] = {
            Kind.JOIN: self._on_join,
            Kind.REFUSE: self._on_refuse,
            Kind.PREPARE: self._on_prepare,
            Kind.PROMISE: self._on_promise,
            Kind.ACCEPT: self._on_accept,
            Kind.ACCEPTED: self._on_accepted,
            Kind.NACK: self._on_nack,
            Kind.VIEW: self._on_view,
            Kind.INSTALLED: self._on_installed,
            Kind.LEAVE: self._on_leave,
        }

    # -- what the node calls

    def leave(self) -> None:
        """Ask to be left out of the next view. `Outcome.gone` follows."""
        self.leaving = True
        self._resend_at_ns = 0
        if self.view is None:
            self._finish()

    def coordinator(self) -> int | None:
        """Who proposes views, as far as this node knows."""
        if self.view is None:
            return None
        alive = self._alive()
        staying = [node for node in alive if not self._leaves(node)]
        return min(staying or alive)

    def tick(self, now_ns: int) -> None:
        """Look at the disk's evidence, start or restart what is due, send again what is due."""
        if self.stopped or self._witness.fenced():
            return
        due = now_ns >= self._resend_at_ns
        if due:
            self._resend_at_ns = now_ns + self._timing.resend_ns
        if self.view is None:
            self._tick_outside(due=due)
        else:
            self._tick_inside(self.view, due=due)
        self._advance()

    def deliver(self, sender: int, untrusted_message: bytes) -> None:
        """A message came in from `sender` (the transport vouches for that number only)."""
        if self.stopped or self._witness.fenced():
            return
        try:
            message = decode(untrusted_message)
        except ValueError:
            self.malformed += 1
            return
        if self._witness.live().get(sender) != message.generation or sender == self.node:
            return
        self._handlers[message.kind](sender, message)
        self._advance()

    # -- coordinator

    def _alive(self) -> dict[int, int]:
        live = self._witness.live()
        members = self.view.generations if self.view else ()
        alive = {node: made for node, made in members if live.get(node) == made}
        alive[self.node] = self.generation
        return alive

    def _leaves(self, node: int) -> bool:
        if node == self.node:
            return self.leaving
        return self.view is not None and self._leavers.get(node) == self.view.generation(node)

    def _tick_outside(self, *, due: bool) -> None:
        live = self._witness.live()
        if self.node not in live:
            return
        claims = self._witness.claims()
        insiders = [node for node in live if node in claims.get(node, ())]
        if insiders or min(live) != self.node:
            self._attempt = None
            if due:
                for node in insiders or [min(live)]:
                    self._send(node, Kind.JOIN, timing=self._timing)
            return
        if self._continues(live, due=due):
            return
        # Nobody is lower and nobody is in a view: this node makes the first one.
        strangers = [
            n for n, made in live.items() if n != self.node and self._joiners.get(n) != made
        ]
        if self._witness.starting() or strangers or not self._preempt(self._witness.unclean()):
            return
        epoch = self._witness.highest_epoch() + 1
        if self._voter.accepted is not None and self._voter.accepted[1].epoch >= epoch - 1:
            epoch = self._voter.accepted[1].epoch
        self._propose(make_view(max(epoch, self._voter.promised.epoch), live), live, bootstrap=True)

    def _tick_inside(self, view: View, *, due: bool) -> None:
        alive = self._alive()
        coordinator = self.coordinator()
        if self.leaving and coordinator != self.node and due:
            for node in alive.keys() - {self.node}:
                self._send(node, Kind.LEAVE)
        if coordinator != self.node:
            self._attempt = None
            return
        if due:
            self._uninformed = {
                node: made for node, made in self._uninformed.items() if alive.get(node) == made
            }
            for node in self._uninformed:
                self._send(node, Kind.VIEW, view=view)
        if self._continues(self._witness.live(), due=due):
            return
        dead = {node: made for node, made in view.generations if alive.get(node) != made}
        staying = {node: made for node, made in alive.items() if not self._leaves(node)}
        wanted = staying or {self.node: self.generation}
        if not staying and len(alive) == 1 and not dead:
            self._finish()
            return
        participants = dict(alive)
        if not dead:
            # A death is agreed upon without newcomers: they could only hold it up.
            wanted |= self._welcome(view)
            participants |= wanted
        if wanted == dict(view.generations) or not self._preempt(dead):
            return
        left = frozenset(alive) - frozenset(wanted)
        new = make_view(view.epoch + 1, wanted, frozenset(dead), left)
        self._propose(new, participants, bootstrap=False)

    def _welcome(self, view: View) -> dict[int, int]:
        live = self._witness.live()
        return {
            node: made
            for node, made in self._joiners.items()
            if live.get(node) == made and node not in view.members and self._admits(node)
        }

    def _preempt(self, nodes: Mapping[int, int]) -> bool:
        done = [self._witness.preempt(node, made) for node, made in nodes.items()]
        return all(done)

    def _continues(self, live: dict[int, int], *, due: bool) -> bool:
        attempt = self._attempt
        if attempt is None:
            return False
        if any(live.get(node) != made for node, made in attempt.participants.items()):
            self._attempt = None
            return False
        if due:
            for node in attempt.waiting_for(live) - {self.node}:
                self._ask(attempt, node)
        return True

    def _propose(self, wanted: View, participants: dict[int, int], *, bootstrap: bool) -> None:
        promised = self._voter.promised
        rounds = [self._round, promised.round if promised.epoch == wanted.epoch else 0]
        self._round = (max(rounds) + 1) % MAX_ROUND
        ballot = Ballot(wanted.epoch, self._round, self.node)
        if not self._voter.promise(ballot):
            return
        attempt = Attempt(ballot, participants, wanted, bootstrap)
        attempt.promises[self.node] = self._voter.accepted_for(ballot.epoch)
        self._attempt = attempt
        for node in attempt.waiting_for(participants):
            self._ask(attempt, node)

    def _ask(self, attempt: Attempt, node: int) -> None:
        if attempt.chosen is None:
            self._send(node, Kind.PREPARE, ballot=attempt.ballot, bootstrap=attempt.bootstrap)
        else:
            self._send(node, Kind.ACCEPT, ballot=attempt.ballot, view=attempt.chosen)

    def _advance(self) -> None:
        """Go to the next phase of the attempt if all have answered."""
        attempt = self._attempt
        if attempt is None:
            return
        live = self._witness.live()
        if attempt.chosen is None:
            if attempt.waiting_for(live):
                return
            view = attempt.choose()
            if not self._voter.accept(attempt.ballot, view):
                self._attempt = None
                return
            attempt.accepts.add(self.node)
            for node in attempt.waiting_for(live):
                self._ask(attempt, node)
        view = attempt.chosen or attempt.wanted
        silent = {node: made for node, made in view.generations if live.get(node) != made}
        silent.pop(self.node, None)
        if attempt.waiting_for(live) or not self._preempt(silent):
            return
        # The write shows that nobody took this node's reservation before (module docstring).
        included = view.generation(self.node) == self.generation
        if not self._witness.publish(view.epoch, view.members if included else frozenset()):
            return
        informed = attempt.participants | dict(view.generations)
        self._attempt = None
        informed.pop(self.node, None)
        self._uninformed = informed
        for node in informed:
            self._send(node, Kind.VIEW, view=view)
        self._install(view)

    # -- everyone

    def _install(self, view: View) -> None:
        old = self.view
        dead = view.dead
        if view.generation(self.node) != self.generation:
            if self.leaving:
                self._finish()
            elif old is not None:
                self.stopped = True
                self._outcome.excluded(f"the view of epoch {view.epoch} was agreed without it")
            return
        if old is not None:
            dead |= old.members - view.members - view.left
        self.view = view
        self._attempt = None
        self._round = 0
        self._joiners = {n: made for n, made in self._joiners.items() if n not in view.members}
        self._leavers = {n: made for n, made in self._leavers.items() if view.generation(n) == made}
        self._outcome.installed(view, dead)

    def _finish(self) -> None:
        self.stopped = True
        self._outcome.gone()

    def _send(
        self,
        node: int,
        kind: Kind,
        *,
        ballot: Ballot = NO_BALLOT,
        bootstrap: bool = False,
        accepted: tuple[Ballot, View] | None = None,
        view: View | None = None,
        epoch: int = 0,
        timing: Timing | None = None,
        text: str = "",
    ) -> None:
        message = Message(
            kind, self.generation, ballot, bootstrap, accepted, view, epoch, timing, text
        )
        self._send_bytes(node, encode(message))

    def _outdated(self, sender: int, message: Message) -> bool:
        """Answer a ballot that this node's view makes pointless."""
        view = self.view
        if view is None:
            return False
        known = view.generation(sender) == message.generation
        if message.ballot.epoch <= view.epoch or message.bootstrap or not known:
            self._send(sender, Kind.VIEW, view=view)
        elif message.ballot.epoch > view.epoch + 1:
            self._send(sender, Kind.NACK, epoch=view.epoch, ballot=self._voter.promised)
        else:
            return False
        return True

    def _nack(self, sender: int) -> None:
        epoch = self.view.epoch if self.view else 0
        self._send(sender, Kind.NACK, epoch=epoch, ballot=self._voter.promised)

    def _on_prepare(self, sender: int, message: Message) -> None:
        if self._outdated(sender, message):
            return
        if not self._voter.promise(message.ballot):
            self._nack(sender)
            return
        if self._attempt is not None and self._attempt.ballot < message.ballot:
            self._attempt = None
        accepted = self._voter.accepted_for(message.ballot.epoch)
        self._send(sender, Kind.PROMISE, ballot=message.ballot, accepted=accepted)

    def _on_accept(self, sender: int, message: Message) -> None:
        view = message.view
        if view is None or view.epoch != message.ballot.epoch or self._outdated(sender, message):
            return
        if not self._voter.accept(message.ballot, view):
            self._nack(sender)
            return
        if self._attempt is not None and self._attempt.ballot < message.ballot:
            self._attempt = None
        self._send(sender, Kind.ACCEPTED, ballot=message.ballot)

    def _on_promise(self, sender: int, message: Message) -> None:
        attempt = self._attempt
        if attempt is None or attempt.ballot != message.ballot or attempt.chosen is not None:
            return
        if attempt.participants.get(sender) == message.generation:
            accepted = message.accepted
            if accepted is None or accepted[1].epoch == attempt.ballot.epoch:
                attempt.promises[sender] = accepted

    def _on_accepted(self, sender: int, message: Message) -> None:
        attempt = self._attempt
        if attempt is not None and attempt.ballot == message.ballot and attempt.chosen is not None:
            attempt.accepts.add(sender)

    def _on_nack(self, sender: int, message: Message) -> None:
        attempt = self._attempt
        if attempt is None:
            return
        if (
            self.view is not None
            and message.epoch < self.view.epoch
            and (self.view.generation(sender) == message.generation)
        ):
            self._send(sender, Kind.VIEW, view=self.view)
        if message.ballot > attempt.ballot:
            if message.ballot.epoch == attempt.ballot.epoch:
                self._round = max(self._round, message.ballot.round)
            elif self.view is None:
                self._voter.promise(Ballot(message.ballot.epoch, message.ballot.round, self.node))
            self._attempt = None

    def _on_view(self, sender: int, message: Message) -> None:
        new = message.view
        if new is None:
            return
        if self.view is None and new.generation(self.node) != self.generation:
            return
        if self.view is None or new.epoch > self.view.epoch:
            self._install(new)
        if self.view is not None and self.view.epoch >= new.epoch:
            self._send(sender, Kind.INSTALLED, epoch=new.epoch)

    def _on_installed(self, sender: int, message: Message) -> None:
        if self.view is not None and message.epoch == self.view.epoch:
            self._uninformed.pop(sender, None)

    def _on_join(self, sender: int, message: Message) -> None:
        if self.view is not None:
            if self.view.generation(sender) == message.generation:
                self._send(sender, Kind.VIEW, view=self.view)
                return
            if self.coordinator() != self.node:
                return
        if message.timing is None:
            return
        mine, theirs = node_label(self.node, self._names), node_label(sender, self._names)
        differences = self._timing.differences(message.timing, mine, theirs)
        if differences:
            text = f"{theirs} can't join: {'; '.join(differences)}; give all nodes the same timings"
            self._send(sender, Kind.REFUSE, text=text)
            return
        self._joiners[sender] = message.generation

    def _on_refuse(self, sender: int, message: Message) -> None:
        if self.view is None:
            self.stopped = True
            text = message.text or "no reason given"
            self._outcome.refused(f"{text} (said by {node_label(sender, self._names)})")

    def _on_leave(self, sender: int, message: Message) -> None:
        if self.view is None:
            return
        if self.view.generation(sender) == message.generation:
            self._leavers[sender] = message.generation
        else:
            self._send(sender, Kind.VIEW, view=self.view)
