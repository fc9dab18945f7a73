"""The voter's and the proposer's memory of one agreement: single-decree Paxos for each epoch.

`Voter` is what a node has promised and accepted. `Attempt` is one proposal of a coordinator. Both
only remember; `membership` decides what to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fs.cluster.view import NO_BALLOT, Ballot, View


@dataclass
class Voter:
    """What this node owes to the ballots that it answered."""

    promised: Ballot = NO_BALLOT
    accepted: tuple[Ballot, View] | None = None

    def promise(self, ballot: Ballot) -> bool:
        """Whether no later ballot was promised; then nothing below `ballot` is accepted again."""
        if ballot < self.promised:
            return False
        self.promised = ballot
        return True

    def accept(self, ballot: Ballot, view: View) -> bool:
        """Whether the view is accepted."""
        if not self.promise(ballot):
            return False
        self.accepted = (ballot, view)
        return True

    def accepted_for(self, epoch: int) -> tuple[Ballot, View] | None:
        """What was accepted as the view of `epoch`."""
        if self.accepted is not None and self.accepted[1].epoch == epoch:
            return self.accepted
        return None


@dataclass
class Attempt:
    """A proposal: first every participant promises.

    Then every participant and every live member of the view accepts.
    """

    ballot: Ballot
    participants: dict[int, int]
    wanted: View
    bootstrap: bool
    promises: dict[int, tuple[Ballot, View] | None] = field(default_factory=dict)
    chosen: View | None = None
    accepts: set[int] = field(default_factory=set)

    def waiting_for(self, live: dict[int, int]) -> set[int]:
        """Who has not answered in this phase."""
        if self.chosen is None:
            return self.participants.keys() - self.promises.keys()
        needed = {node for node, made in self.chosen.generations if live.get(node) == made}
        # Those who leave accept too: if the members go next, one who left knows what was agreed.
        return (needed | self.participants.keys()) - self.accepts

    def choose(self) -> View:
        """The view to be accepted: one that may be agreed already, or else the wanted one."""
        bound = [promise for promise in self.promises.values() if promise is not None]
        self.chosen = max(bound, key=lambda pair: pair[0])[1] if bound else self.wanted
        return self.chosen
