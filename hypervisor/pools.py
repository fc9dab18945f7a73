"""Guests and pools, and how a handle finds its page (`objects` has the lower half of the way).

  client.members[pool id] -> member.pool.objects[oid] -> object.leaf(index >> 6)[index & 63] -> page

A *member* is one guest's part in one pool: its id for it, its rights, and the pages that it put
there, which are charged to it.  A private pool has one member; a shared pool up to 64, and beside
them what is left of members that have gone (`heir`), paid for by one that stayed.

A page number below the number of frames is a raw page in the frame of that number; the numbers
above are entries (`entries`).

Differs from Xen: a page of a shared pool belongs to whoever put it.  There the pool's owner was
charged for all of them, and a leaving sharer took the objects with it that it had touched last.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hypervisor.accounting import Account
from hypervisor.arena import SLOT_SHIFT
from hypervisor.compression import Compressor
from hypervisor.objects import Objects
from hypervisor.pressure import Wishes
from hypervisor.sharing import Sharing, domain_of
from ipc.abi import (
    PAGE_BYTES,
    POOL_PRIORITY_MASK,
    POOL_PRIORITY_SHIFT,
    GuestId,
    PoolFlag,
    PoolId,
    Priority,
)

if TYPE_CHECKING:
    from hypervisor.eviction import EvictionPolicy
    from hypervisor.reuse import ReuseSampler
    from hypervisor.tokens import Tokens

SHARERS_MAX: Final = 64
"""Members of a shared pool at a time."""

RAW_COST_BYTES: Final = PAGE_BYTES
"""What a page with a frame of its own is charged."""


class Pool:
    """`objects` maps an oid to its object; `pages` counts the pages below them.

    `members` maps a slot to a member; `only` is the one of a private pool, None for a shared one.
    """

    __slots__ = (
        "exclusive",
        "flags",
        "leaves",
        "members",
        "notes",
        "number",
        "objects",
        "only",
        "pages",
        "persistent",
        "priority",
        "shared",
        "tokens",
        "uuid",
        "vets",
    )

    def __init__(self, number: int, flags: int, uuid: bytes) -> None:
        self.number = number
        self.flags = flags
        self.uuid = uuid
        self.persistent = bool(flags & PoolFlag.PERSIST)
        self.shared = bool(flags & PoolFlag.SHARED)
        self.exclusive = not self.persistent and not self.shared
        """A get takes the page out."""
        self.priority = Priority(flags >> POOL_PRIORITY_SHIFT & POOL_PRIORITY_MASK)
        self.objects = Objects()
        self.pages = 0
        self.leaves = 0
        """Those of doomed objects too."""
        self.members: dict[int, Member] = {}
        self.only: Member | None = None
        self.tokens: Tokens | None = None
        """Of a shared ephemeral pool."""
        self.notes = False
        """Something is to be written beside its pages (`beside`)."""
        self.vets = False
        """A page may be one that nobody may have: gets look at each."""

    @property
    def kind(self) -> str:
        """Xen's two letters: E or P, then P or S."""
        return ("P" if self.persistent else "E") + ("S" if self.shared else "P")

    def sharers(self) -> list[Member]:
        """Members that are still here, by slot."""
        return [self.members[slot] for slot in sorted(self.members) if not self.members[slot].heir]


class Purse:
    """Bytes that one guest is charged for pages of one kind, and the targets of its members."""

    __slots__ = ("bytes", "target_bytes")

    def __init__(self) -> None:
        self.bytes = 0
        self.target_bytes = 0


class Member:
    """A guest's part in a pool.  `pages` and `cost_bytes` are what is charged to it: pages that it
    put and that still take memory, flushed ones that wait to be reaped included."""

    __slots__ = (
        "client",
        "cost_bytes",
        "disowned",
        "foreign",
        "heir",
        "keyed",
        "may_get",
        "may_put",
        "number",
        "origin",
        "pages",
        "policy",
        "pool",
        "pool_id",
        "purse",
        "record",
        "sampler",
        "slot",
        "state_bits",
        "target_bytes",
        "tokens",
        "weight",
        "writer",
    )

    def __init__(
        self, pool: Pool, client: Client, slot: int, pool_id: PoolId, *, record: int = -1
    ) -> None:
        self.pool = pool
        self.client = client
        self.tokens = pool.tokens
        """The pool's, where every put finds them."""
        self.slot = slot
        self.pool_id = pool_id
        self.number = -1
        """Its name in `sharing`; the store gives it."""
        self.record = record
        """Number of its record in the segment; -1 for a private pool, whose pool record does."""
        self.state_bits = slot << SLOT_SHIFT
        self.origin = client.name, client.pid
        """Who put its pages, whoever pays for them."""
        self.disowned = 0
        """Sequence up to which nobody may have its pages (`quarantine`)."""
        self.heir = False
        self.foreign = False
        """An heir's, whose pages another guest put."""
        self.writer = True
        self.may_get = True
        self.may_put = True
        """A writer, allowed, and the guest is not frozen: what a put looks at first."""
        self.pages = 0
        self.cost_bytes = 0
        self.purse = client.purses[pool.persistent]
        self.weight = client.settings.pool_weights.get(str(pool_id), 100)
        """Among the pools of its guest."""
        self.target_bytes = 0
        self.policy: EvictionPolicy | None = None
        """Of an ephemeral pool only."""
        self.sampler: ReuseSampler | None = None
        self.keyed = False
        """The policy or the sampler wants to know which leaf a page is in."""

    def charge(self, pages: int, cost_bytes: int) -> None:
        """Change what is charged."""
        self.pages += pages
        self.cost_bytes += cost_bytes
        self.purse.bytes += cost_bytes

    def aim(self, target_bytes: int) -> None:
        """Set the target."""
        self.purse.target_bytes += target_bytes - self.target_bytes
        self.target_bytes = target_bytes

    def pass_to(self, client: Client) -> None:
        """The guest has left the pool; it pays further on without a target, or another one does.
        Among the possible victims it must be entered anew."""
        self.aim(0)
        self.purse.bytes -= self.cost_bytes
        self.foreign = self.foreign or client is not self.client
        self.client = client
        self.purse = client.purses[self.pool.persistent]
        self.purse.bytes += self.cost_bytes
        self.heir = True
        self.may_get = self.may_put = False


@dataclass
class Settings:
    """What the administrator has set for a guest; kept by name, also while it is away."""

    weight: int = 100
    cap_bytes: int = 0
    """The most that its pages may cost, of both kinds; 0 for no limit."""
    reserve_bytes: int = 0
    """What others can't take from it."""
    priority: Priority = Priority.NORMAL
    compress: bool = False
    sharing: Sharing = Sharing.GROUP
    group: str = ""
    """Its trust group; without a name it trusts nobody, and shares with nobody under GROUP."""
    frozen: bool = False
    borrow: bool = False
    """It may hold persistent pages beyond its allotment, in memory that nobody else uses: it is
    trusted to take them back when it is asked."""
    balloon_bytes: int = 0
    """How much RAM it should have, in whole pages; 0 for no wish."""
    pool_weights: dict[str, int] = field(default_factory=dict)
    """By pool id, as text; forgotten when the guest leaves."""


class Client:
    """A guest as the machine knows it: its number, its part in pools, its account."""

    __slots__ = (
        "account",
        "allotment_bytes",
        "compressor",
        "domains",
        "encodes",
        "inherited",
        "lent",
        "members",
        "name",
        "number",
        "pid",
        "purses",
        "settings",
        "start_ticks",
        "uid",
        "wishes",
    )

    def __init__(
        self,
        number: GuestId,
        name: str,
        pid: int,
        start_ticks: int,
        uid: int,
        settings: Settings,
    ) -> None:
        self.number = number
        self.name = name
        self.pid = pid
        self.start_ticks = start_ticks
        self.uid = uid
        self.members: dict[int, Member] = {}
        self.inherited: list[Member] = []
        """What it pays for in pools that it has left, or for guests that have gone."""
        self.purses = (Purse(), Purse())
        """Ephemeral, persistent."""
        self.allotment_bytes = 0
        """What its persistent pages may cost; `Entitlements` sets it."""
        self.account = Account()
        self.wishes = Wishes()
        self.lent = array("I")
        """Frames that it has as RAM (`lending`)."""
        self.compressor = Compressor()
        self.settings = settings
        self.domains: tuple[str | None, str | None] = (None, None)
        """Where equal pages are looked for, ephemeral and persistent; None for nowhere."""
        self.encodes = False
        self.apply_settings()

    def apply_settings(self) -> None:
        """Take over what puts look at, after a change of `settings`."""
        settings = self.settings
        alone = settings.sharing is Sharing.GROUP and not settings.group
        scope = Sharing.OFF if alone else settings.sharing
        ephemeral, persistent = (
            domain_of(scope, guest=self.name, group=settings.group, persistent=kind)
            for kind in (False, True)
        )
        self.domains = (ephemeral, persistent)
        self.encodes = settings.compress or scope is not Sharing.OFF
        for member in self.members.values():
            member.may_put = member.writer and member.may_get and not settings.frozen

    @property
    def cost_bytes(self) -> int:
        """All that is charged to it."""
        return self.purses[0].bytes + self.purses[1].bytes

    @property
    def foreign_bytes(self) -> int:
        """What its persistent purse pays for guests that have gone."""
        return sum(
            member.cost_bytes
            for member in self.inherited
            if member.foreign and member.pool.persistent
        )

    @property
    def over_bytes(self) -> int:
        """What its persistent pages cost beyond its allotment; below 0 it may have more."""
        return self.purses[True].bytes - self.foreign_bytes - self.allotment_bytes

    def private_persistent(self) -> tuple[int, int]:
        """Pages that only itself can take back, and what they cost."""
        pages = cost_bytes = 0
        for member in self.members.values():
            if member.policy is None and not member.pool.shared:
                pages += member.pages
                cost_bytes += member.cost_bytes
        return pages, cost_bytes

    def charged(self) -> list[Member]:
        """Its parts in pools, inherited ones too."""
        return [*self.members.values(), *self.inherited]

    def pages(self, *, persistent: bool) -> int:
        """Pages that are charged to it."""
        return sum(part.pages for part in self.charged() if part.pool.persistent == persistent)
