"""A new view: every resource gets its master anew, and nothing that was granted is lost.

The steps, at every member of the new view, each on its own:
  1  the links start anew; whatever of the old view is under way has no effect any more;
  2  it tells the new master of each resource it mastered what only a master knows (`Record`), then
     the new master of each of its own locks what it holds and wants (`Claim`), then all members
     that it is done (`Done`);
  3  when it has the `Done` of all members it knows all claims on what it masters now, puts the
     resources together (`Rebuild.finish`), and grants. It is *ready*.
Holders go on using what they hold meanwhile; requests wait. If the view changes before a node is
ready, everything starts again from 1, and what the node was told in step 2 is forgotten.

All resources go through this, not only those of dead masters: one path, used at every join,
instead of three that are used rarely. o2dlm recovers a dead node's resources one by one, under a
"$RECOVERY" lock.

Who is master is a rendezvous hash over name and members: every member can compute it, and when
the members change only the resources of those that came or went change their master. In o2dlm the
first node to ask becomes the master, which saves the message when one node uses a file alone; the
price is a question to all nodes for each new name, and races of that question with deaths.

Truth about a resource:
  - holders are those that claim, nobody else. A grant of the old view that did not arrive is not
    claimed; then the request still is;
  - the token is known if a record came. Else the new one is `epoch << 32` at least, above all of
    earlier epochs. Claims of PR or EX prove that nobody was granted EX since, but not that the lost
    master lifted nothing: whoever it lifted may be dead for us, and still have a put under way;
  - the value is that of any reader, and else the one that is stamped with the newest token of
    records and claims; if nobody has it (its EX holder died, or gave it up in a message that was
    lost), or nobody holds PR or EX and no record came, it is not valid;
  - if the dead node held EX, the resource is held back until its journal was replayed, when the
    file system asked for that. A master that died takes with it the knowledge who held EX: then
    each resource without record, PR and EX claims is held back for all unreplayed nodes, and a
    `Grave` remembers which these are, also for names that nobody asks for until later. It stays
    after the journals were replayed, and there is one for a master that left cleanly, too: the
    first value of such a name is lost, not zeros.

A node that missed a view without it (it was dead for the others) has lost its locks, whatever it
believes: its claims don't count, and it learns that it is *expelled*. Starting again with a new
lock manager, it is a node that remembers nothing, which to the others is a death and a join.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from fs.dlm.messages import (
    TOKEN_MAX,
    Claim,
    Death,
    Done,
    Flag,
    Grave,
    Record,
    Request,
)
from fs.dlm.modes import Mode
from fs.dlm.resource import FIRST_VALUE, Post, Resource

EPOCH_SHIFT = 32
EPOCH_MAX = (1 << 31) - 1
"""The tokens of a higher one would not be below `TOKEN_MAX`."""
GRAVES_MAX = 64
LIFT_ROOM = 1 << 31
"""EX grants that are left to a resource in this epoch, however far it was lifted."""


def lift_limit(epoch: int) -> int:
    """Tokens are lifted in `epoch` to less than this.

    So a lift is always below `epoch + 1 << 32`, from where the next view goes on if the lift was
    lost with its master; and a master whose view has ended can't lift anything to what the next
    view's masters give out so. Whoever remembers tokens has them from this cluster, so honest
    wishes are below, unless one epoch sees 2**31 grants.
    """
    return min((epoch << EPOCH_SHIFT) + LIFT_ROOM, TOKEN_MAX)


def token_limit(epoch: int) -> int:
    """All tokens are below this in `epoch`, unless one epoch sees 2**31 grants."""
    return (epoch + 1) << EPOCH_SHIFT


def master_of(name: bytes, members: Iterable[int]) -> int:
    """The member with the highest hash together with `name`."""
    return max(
        members,
        key=lambda node: hashlib.blake2b(name, digest_size=8, key=bytes((node,))).digest(),
    )


class Findings:
    """What a node knows about the cluster's past, once it is ready."""

    def __init__(self) -> None:
        self.held: frozenset[Death] = frozenset()
        """Deaths whose journals were not replayed."""
        self.released: dict[int, int] = {}
        """For each node, the newest epoch up to which its deaths are done with."""
        self.graves: frozenset[Grave] = frozenset()
        self.floor = 0
        """Tokens of resources that nobody remembers start above this."""
        self.expelled: frozenset[int] = frozenset()
        self.gone: frozenset[int] = frozenset()
        """Nodes whose locks of the view before don't exist any more."""
        self.resources: dict[bytes, Resource] = {}

    def unreleased(self, deaths: frozenset[Death]) -> frozenset[Death]:
        """Those that are not done with."""
        return frozenset(d for d in deaths if d.epoch > self.released.get(d.node, -1))

    def release(self, *deaths: Death) -> None:
        """These are done with, and so are earlier ones of the same nodes."""
        for death in deaths:
            self.released[death.node] = max(death.epoch, self.released.get(death.node, -1))
        self.held = self.unreleased(self.held)
        left = {
            Grave(grave.lost, grave.members, self.unreleased(grave.deaths)) for grave in self.graves
        }
        if len(left) > GRAVES_MAX:
            # Holds back too much, until the journals were replayed, and distrusts all values.
            members = frozenset[int]().union(*(grave.members for grave in left))
            all_deaths = frozenset[Death]().union(*(grave.deaths for grave in left))
            left = {Grave(members, members, all_deaths)}
        self.graves = frozenset(left)

    def new(self, name: bytes) -> Resource:
        """A resource that nobody remembers."""
        graves = [grave for grave in self.graves if master_of(name, grave.members) in grave.lost]
        resource = Resource(name, self.floor, None if graves else FIRST_VALUE)
        resource.deaths = self.buried(name)
        return resource

    def buried(self, name: bytes) -> frozenset[Death]:
        """Nodes that may have held `name` in EX when its master was lost."""
        return frozenset[Death]().union(
            *(grave.deaths for grave in self.graves if master_of(name, grave.members) in grave.lost)
        )


class Rebuild:
    """What one node collects as a master in a new view."""

    def __init__(self, epoch: int, members: frozenset[int]) -> None:
        self.epoch = epoch
        self.members = members
        self.posts: list[Post] = []
        """After `finish`: what has to be told to whom."""
        self._dones: dict[int, Done] = {}
        self._claims: dict[bytes, dict[int, Claim]] = {}
        self._records: dict[bytes, dict[int, Record]] = {}

    @property
    def complete(self) -> bool:
        """All members are done."""
        return len(self._dones) == len(self.members)

    @property
    def missing(self) -> frozenset[int]:
        """Members that are not done yet."""
        return self.members - self._dones.keys()

    def take(self, from_node: int, message: Claim | Record | Done) -> None:
        """A member told what it knows."""
        if from_node in self._dones:
            return
        match message:
            case Claim():
                self._claims.setdefault(message.name, {})[from_node] = message
            case Record():
                self._records.setdefault(message.name, {})[from_node] = message
            case Done():
                self._dones[from_node] = message

    def expelled(self) -> frozenset[int]:
        """Members whose locks were given away in a view that they missed."""
        return frozenset(
            node
            for node, done in self._dones.items()
            if done.epoch_before
            and any(
                other.epoch_before > done.epoch_before and not _was_member(node, done, other)
                for other in self._dones.values()
            )
        )

    def finish(self, known: Findings) -> Findings:
        """Put the resources together; `known` is what this node knew by itself."""
        dones = self._dones
        newest = max(dones.values(), key=lambda done: done.epoch_before)
        before = frozenset(member.node for member in newest.members_before)
        findings = Findings()
        findings.expelled = self.expelled()
        findings.gone = findings.expelled | frozenset(
            node for node in before if node not in dones or not dones[node].epoch_before
        )
        findings.floor = max(
            self.epoch << EPOCH_SHIFT, *(done.highest_token for done in dones.values())
        )
        findings.released = dict(known.released)
        findings.held = known.held.union(*(done.held for done in dones.values()))
        for done in dones.values():
            findings.graves |= done.graves
            findings.release(*(Death(d.node, min(d.epoch, self.epoch)) for d in done.released))
        lost = (findings.gone & before) | frozenset(
            node
            for node in before & dones.keys()
            if dones[node].epoch_before != newest.epoch_before or not dones[node].ready
        )
        if lost:
            findings.graves |= {Grave(lost, before, findings.held)}
        findings.release()
        for name in sorted(self._claims.keys() | self._records.keys()):
            self._resource(name, findings)
        return findings

    def _resource(self, name: bytes, findings: Findings) -> None:
        claims = {
            node: claim
            for node, claim in sorted(self._claims.get(name, {}).items())
            if node not in findings.expelled
        }
        records = [
            record
            for node, record in self._records.get(name, {}).items()
            if node not in findings.expelled
        ]
        resource = findings.new(name)
        holding = [claim for claim in claims.values() if claim.granted in {Mode.PR, Mode.EX}]
        if records or holding:
            resource.deaths = frozenset()
            _settle(resource, records, claims.values())
        # A reader that went past a hold proves nothing about the dead node.
        if not records and not any(not claim.flags & Flag.RECOVERING for claim in holding):
            resource.deaths = findings.buried(name)
        for record in records:
            resource.deaths |= findings.unreleased(record.deaths)
            if record.exclusive in findings.gone:
                resource.deaths |= {d for d in findings.held if d.node == record.exclusive}
        for node, claim in claims.items():
            if claim.granted is not None:
                resource.holders[node] = claim.granted
        for node, claim in claims.items():
            if claim.wanted is not None:
                request = Request(name, claim.request, claim.wanted, claim.flags)
                self.posts += resource.ask(node, request)
        if resource.unused:
            findings.floor = max(findings.floor, resource.token)
        else:
            findings.resources[name] = resource


def _was_member(node: int, done: Done, other: Done) -> bool:
    since = {member.node: member.since for member in other.members_before}
    return node in since and since[node] <= done.epoch_before


def _settle(resource: Resource, records: list[Record], claims: Iterable[Claim]) -> None:
    """Token and value, when somebody knows them."""
    claims = [claim for claim in claims if claim.granted is not None]
    known = [record.token for record in records]
    known += [claim.token for claim in claims]
    newest = max(known)
    resource.token = resource.stamp = newest if records else max(newest, resource.token)
    resource.value = None
    if any(claim.granted == Mode.EX for claim in claims):
        # The value is his, and may change any time: what is known here is none, if he dies.
        resource.stamp = 0
        return
    for stamp, value in [
        *((record.stamp, record.value) for record in records),
        *((claim.token, claim.value) for claim in claims),
    ]:
        if stamp == newest and value is not None:
            resource.value = value
    for claim in claims:
        # Its token may be older than that: the answer to a lift, or a grant of EX, was lost.
        if claim.granted == Mode.PR and claim.value is not None:
            resource.value = claim.value
