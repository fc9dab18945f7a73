"""All resources that one node is the master of, and what it knows of the cluster's past."""

from __future__ import annotations

from fs.dlm.messages import Cancel, Death, Done, Down, Lift, Member, Record, Request
from fs.dlm.recovery import Findings, lift_limit
from fs.dlm.resource import Post, Resource


class Master:
    """Resources come with their first request and go when nobody has an interest any more."""

    def __init__(self) -> None:
        self.known = Findings()
        self.resources: dict[bytes, Resource] = {}
        self.highest_token = 0
        """Of any resource, seen here in any role."""
        self._epoch = 0

    def start(self, epoch: int) -> None:
        """A new view: what was mastered until now is somebody's record."""
        self._epoch = epoch
        self.resources = {}

    def done(
        self, epoch_before: int, before: tuple[Member, ...], deaths: set[Death], *, ready: bool
    ) -> Done:
        """What the others have to know at the end of a view; `deaths` are those that end it."""
        known = self.known
        released = frozenset(Death(*item) for item in known.released.items())
        held = known.held | deaths
        return Done(epoch_before, ready, self.highest_token, before, held, released, known.graves)

    def adopt(self, findings: Findings) -> None:
        """The view's resources are put together."""
        self.known = findings
        self.resources = findings.resources
        self.saw(findings.floor)

    def records(self) -> list[Record]:
        """What the next masters have to know."""
        return [resource.record() for resource in self.resources.values()]

    def saw(self, token: int) -> None:
        """There is such a token."""
        self.highest_token = max(self.highest_token, token)

    def handle(self, from_node: int, message: Request | Cancel | Down | Lift) -> list[Post] | None:
        """What is to be told to whom; None if there is no such resource, or no right to that."""
        posts: list[Post] | None
        resource = self.resources.get(message.name)
        if isinstance(message, Request):
            if resource is None:
                resource = self.resources[message.name] = self.known.new(message.name)
            posts = resource.ask(from_node, message)
        elif resource is None:
            return None
        elif isinstance(message, Cancel):
            posts = resource.cancel(from_node, message)
        elif isinstance(message, Lift):
            if message.token >= lift_limit(self._epoch):
                return None
            posts = resource.lift(from_node, message)
        else:
            posts = resource.down(from_node, message)
        self.saw(resource.token)
        self._forget_unused(resource)
        return posts

    def release(self, death: Death) -> list[Post]:
        """A journal was replayed."""
        self.known.release(death)
        posts = []
        for resource in list(self.resources.values()):
            if resource.deaths:
                posts += resource.release(self.known.unreleased(resource.deaths))
                self._forget_unused(resource)
        return posts

    def _forget_unused(self, resource: Resource) -> None:
        if resource.unused:
            self.known.floor = max(self.known.floor, resource.token)
            del self.resources[resource.name]
