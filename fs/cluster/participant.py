"""What every node does in the agreement: vote, install views, answer those who ask.

The other half, what only a coordinator does, is `membership`, which says how it all works.
"""

from __future__ import annotations

from collections.abc import Callable

from fs.cluster.agreement import Attempt, Voter
from fs.cluster.config import Timing, node_label
from fs.cluster.messages import Kind, Message, encode
from fs.cluster.view import NO_BALLOT, Ballot, View
from fs.cluster.witness import Outcome, Witness, admit_all


class Participant:
    """State and answers of one node."""

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
        self._settled_epoch = 0
        self._joiners: dict[int, int] = {}
        self._leavers: dict[int, int] = {}
        self._uninformed: dict[int, int] = {}
        self._resend_at_ns = 0
        self._outbox: list[tuple[int, bytes]] = []
        self._flushing = False

    def coordinator(self) -> int | None:
        """Who proposes views, as far as this node knows."""
        if self.view is None:
            return None
        alive = self._alive()
        staying = [node for node in alive if not self._leaves(node)]
        return min(staying or alive)

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

    def _install(self, view: View) -> None:
        old = self.view
        dead = view.dead
        if view.generation(self.node) != self.generation:
            if self.leaving:
                self._finish()
            elif old is None:
                self._settled_epoch = view.epoch
            else:
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
        self._outbox.append((node, encode(message)))

    def _flush(self) -> None:
        """Send what was queued; `send` may deliver at once, and even answer."""
        if self._flushing:
            return
        self._flushing = True
        try:
            while self._outbox:
                self._send_bytes(*self._outbox.pop(0))
        finally:
            self._flushing = False

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
