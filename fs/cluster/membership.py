"""Agreed membership: all live nodes go through the same views in the same order.

The disk says who is alive (`heartbeat`), messages make the nodes agree. Linux's o2cb has no views:
each node acts on its own heartbeat, and o2dlm agrees on a domain's members with messages of its
own. A lock manager that re-masters by a rule needs one list, so here is one.

The coordinator is the lowest live member. For the view of epoch e + 1 it
  1. takes the reservations of the members that died (no write of theirs comes after that);
  2. asks all live members of e, and those who join, to promise (PREPARE, PROMISE);
  3. proposes a view: one that a participant had accepted already, else its own (ACCEPT, ACCEPTED);
  4. when all of them and all live members of that view have accepted it, writes the epoch into its
     own heartbeat sector, installs the view and sends it (VIEW, INSTALLED).
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

from fs.cluster.agreement import Attempt
from fs.cluster.messages import MAX_ROUND, Kind, Message, decode
from fs.cluster.participant import Participant
from fs.cluster.view import MAX_EPOCH, Ballot, View, make_view


class Membership(Participant):
    """The part of one node in the agreement."""

    def leave(self) -> None:
        """Ask to be left out of the next view. `Outcome.gone` follows."""
        self.leaving = True
        self._resend_at_ns = 0
        if self.view is None:
            self._finish()

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
        self._flush()

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
        handler: Callable[[int, Message], None] = getattr(self, f"_on_{message.kind.name.lower()}")
        handler(sender, message)
        self._advance()
        self._flush()

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
        if strangers or not self._witness.silent() or not self._preempt(self._witness.unclean()):
            return
        epoch = self._witness.highest_epoch() + 1
        accepted = self._voter.accepted
        if accepted is not None and accepted[1].epoch > max(self._settled_epoch, epoch - 2):
            # What was accepted may have been agreed: that is brought to its end first.
            epoch = accepted[1].epoch
        self._propose(make_view(max(epoch, self._voter.promised.epoch), live), live, bootstrap=True)

    def _tick_inside(self, view: View, *, due: bool) -> None:
        alive = self._alive()
        coordinator = self.coordinator()
        if self.leaving and coordinator != self.node and due:
            for node in alive.keys() - {self.node}:
                self._send(node, Kind.LEAVE)
        if due:
            # Whoever completed the agreement spreads it, coordinator or (by a new member) not.
            self._uninformed = {
                node: made for node, made in self._uninformed.items() if alive.get(node) == made
            }
            for node in self._uninformed:
                self._send(node, Kind.VIEW, view=view)
        if coordinator != self.node:
            self._attempt = None
            return
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
        if wanted.epoch > MAX_EPOCH:
            # Somebody lied about the last one; the views end here, and the nodes go on.
            return
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
