"""Shared contents: which bytes are stored already, who refers to them, and what each pays.

A *content* is the bytes of a page, stored once, and a number here.  Its *location* (a frame, a slab
place) is the caller's word for where they are and in what form; nothing in this module reads them.
To store a page:

    digest = contents.digest(page, domain)        `page` is a private copy, never the window
    content = contents.find(digest)
    found, and the stored bytes are equal         add(content, member, ...)
    found, and they are not                       store the page unshared
    not found                                     insert(digest, location), then add(...)

The digest never decides: bytes are always compared, so 40 bits of it are kept and a chance match
costs one page its sharing.  It is xxh3-128 with a seed that is drawn at every boot and never shown,
so that nobody can prepare pages that fall into one bucket.

Who may learn, from how fast a put is, that a page is stored elsewhere?  Everybody in its *domain*:
a guest alone, a group of guests, or all (`domain_of`).  The domain is part of the digest and of
what is compared, so contents of two domains never match.  Ephemeral and persistent pages are
domains of their own, since what may vanish can't be what must stay.  `retire` ends a domain at
once, though its contents may wait to be reaped: the next guest of that name starts with nothing.

*Fair charge.*  Of n references to a content of b bytes a holder with r pays r * b // n (`charge`).
Whoever comes or goes changes what the others pay, and `add` and `drop` say by how much, so that the
charges of all members are at any time the sums of what `charge` says.  The rounding, less than a
byte a holder, is nobody's.

The index is a hash table that grows and shrinks by one bucket at a time (linear hashing), in
arrays: 33 bytes a content whatever their number, and no call pays for moving all the others.
A content with several holders has a dict as well.

Xen (2010 to 2016) had 256 red-black trees and compared whole pages on the way down, for ephemeral
pages only, because nobody knew whom to charge; all guests were one domain, which is why it went.
"""

from __future__ import annotations

import sys
from array import array
from enum import StrEnum
from typing import Final

from xxhash import xxh3_64_intdigest, xxh3_128_intdigest

from ipc.errors import InvariantError

Charges = list[tuple[int, int]]
"""Members, and by how many bytes what they are charged goes up (or down)."""


class Sharing(StrEnum):
    """With whom a guest shares the bytes of equal pages."""

    OFF = "off"
    GUEST = "guest"
    GROUP = "group"
    ALL = "all"


_HASH_BITS: Final = 40
_HASH_MASK: Final = (1 << _HASH_BITS) - 1
_DOMAIN_MASK: Final = (1 << 64 - _HASH_BITS) - 1
"""After so many domains, numbers begin again; seeds do not, so that it takes luck as well."""
_LOAD: Final = 1.5
"""Contents a bucket."""
_BUCKETS_LEAST_BITS: Final = 6
REFS_MAX: Final = 1024
HOLDERS_MAX: Final = 32
"""Of one content; beyond, a second copy is made, as Linux does for merged pages since 4.13
(max_page_sharing, there 256)."""
_PART: Final = 4096
_NOBODY: Final = -1
_SEVERAL: Final = -2


def charge(held_bytes: int, refs: int, holder_refs: int) -> int:
    """What a holder of `holder_refs` of all `refs` references pays of the bytes held."""
    return holder_refs * held_bytes // refs


def domain_of(sharing: Sharing, *, guest: str, group: str, persistent: bool) -> str | None:
    """The domain in which a guest's pages of one kind may match; None if in none."""
    kind = "persistent" if persistent else "ephemeral"
    match sharing:
        case Sharing.GUEST:
            return f"{kind} guest {guest}"
        case Sharing.GROUP:
            return f"{kind} group {group}"
        case Sharing.ALL:
            return f"{kind} all"
    return None


class SharedContents:
    """`location[content]` and `refs[content]` are for reading.  A number whose content has no
    reference any more is free and will be used again."""

    def __init__(self, seed: int) -> None:
        self._seed = seed & (1 << 64) - 1
        self._domains: dict[str, tuple[int, int]] = {}
        """Number and hash seed of the domains that are not retired."""
        self._domains_made = 0
        self.location = array("Q")
        self.refs = array("I")
        self._digest = array("Q")
        self._next = array("i")
        """The next content in the bucket, or the next free number."""
        self._holder = array("i")
        """The member that has all references, or _SEVERAL."""
        self._holders: list[dict[int, dict[int, int]]] = []
        """A dictionary for each `_PART` contents: one for all would grow by a million at once."""
        self._free = _NOBODY
        self._heads = array("i", [_NOBODY]) * (1 << _BUCKETS_LEAST_BITS)
        self._mask = (1 << _BUCKETS_LEAST_BITS) - 1
        """Of the buckets before this round of splits; the other half begins at _mask + 1."""
        self.count = 0
        """Contents."""
        self.references = 0
        """Of all contents."""

    # --- domains

    def digest(self, page: bytes, domain: str) -> int:
        """What `find` and `insert` know a page's bytes by; worthless after the domain's end."""
        known = self._domains.get(domain)
        if known is None:
            known = self._domains[domain] = self._number_domain(domain)
        number, seed = known
        return number << _HASH_BITS | xxh3_128_intdigest(page, seed) & _HASH_MASK

    def unmatched_digest(self) -> int:
        """A digest that no page will ever have: of a content that is never to be found."""
        number, seed = self._number_domain("")
        return number << _HASH_BITS | seed & _HASH_MASK

    def retire(self, domain: str) -> None:
        """No page will match what was stored in this domain until now."""
        self._domains.pop(domain, None)

    def reseed(self, seed: int) -> None:
        """Digests are made under another seed from now on: what is stored is shared by those who
        share it, and matches nothing new."""
        self._seed = seed & (1 << 64) - 1
        self._domains.clear()

    def _number_domain(self, domain: str) -> tuple[int, int]:
        seed = xxh3_64_intdigest(b"%d %s" % (self._domains_made, domain.encode()), self._seed)
        number = self._domains_made & _DOMAIN_MASK
        self._domains_made += 1
        return number, seed

    # --- the index

    def find(self, digest: int) -> int:
        """The content that may have these bytes, -1 if there is none."""
        content = self._heads[self._bucket(digest)]
        digests = self._digest
        while content >= 0 and digests[content] != digest:
            content = self._next[content]
        return content

    def insert(self, digest: int, location: int) -> int:
        """A content without references; the caller adds the first one.  Precondition: `find` says
        that there is none of this digest."""
        content = self._free
        if content >= 0:
            self._free = self._next[content]
            self._digest[content] = digest
            self.location[content] = location
        else:
            content = len(self.refs)
            self._digest.append(digest)
            self.location.append(location)
            self.refs.append(0)
            self._next.append(_NOBODY)
            self._holder.append(_NOBODY)
            if content // _PART == len(self._holders):
                self._holders.append({})
        self._link(content, digest)
        self.count += 1
        if self.count > _LOAD * len(self._heads):
            self._split()
        return content

    def move(self, content: int, location: int) -> None:
        """The same bytes are elsewhere now, or in another form."""
        self.location[content] = location

    def is_crowded(self, content: int, member: int) -> bool:
        """So many refer to it that a reference more would make calls too long: each one costs a
        step when the bytes move, each holder one whenever a reference comes or goes."""
        if self.refs[content] >= REFS_MAX:
            return True
        if self._holder[content] != _SEVERAL:
            return False
        holders = self._holders[content // _PART][content]
        return len(holders) >= HOLDERS_MAX and member not in holders

    def hide(self, content: int) -> None:
        """It keeps its references and is not found any more: the next equal page is stored anew."""
        self._unlink(content)
        digest = self.unmatched_digest()
        self._digest[content] = digest
        self._link(content, digest)

    def _link(self, content: int, digest: int) -> None:
        bucket = self._bucket(digest)
        self._next[content] = self._heads[bucket]
        self._heads[bucket] = content

    def _unlink(self, content: int) -> None:
        bucket = self._bucket(self._digest[content])
        at = self._heads[bucket]
        if at == content:
            self._heads[bucket] = self._next[content]
        else:
            while self._next[at] != content:
                at = self._next[at]
            self._next[at] = self._next[content]

    def _remove(self, content: int) -> None:
        self._unlink(content)
        self._next[content] = self._free
        self._free = content
        self._holder[content] = _NOBODY
        self.count -= 1
        if self.count < _LOAD / 2 * len(self._heads):
            self._merge()

    def _bucket(self, digest: int) -> int:
        bucket = digest & (self._mask << 1 | 1)
        return bucket if bucket < len(self._heads) else bucket & self._mask

    def _split(self) -> None:
        """One bucket more: it takes what is its own from the bucket half a table below."""
        new = len(self._heads)
        self._heads.append(_NOBODY)
        half = self._mask + 1
        content = self._heads[new - half]
        self._heads[new - half] = _NOBODY
        while content >= 0:
            following = self._next[content]
            bucket = new if self._digest[content] & half else new - half
            self._next[content] = self._heads[bucket]
            self._heads[bucket] = content
            content = following
        if new + 1 == 2 * half:
            self._mask = self._mask << 1 | 1

    def _merge(self) -> None:
        """One bucket less: its contents go back to the bucket half a table below."""
        last = len(self._heads) - 1
        if last < 1 << _BUCKETS_LEAST_BITS:
            return
        if last == self._mask:
            self._mask >>= 1
        content = self._heads.pop()
        bucket = last - self._mask - 1
        while content >= 0:
            following = self._next[content]
            self._next[content] = self._heads[bucket]
            self._heads[bucket] = content
            content = following

    # --- references and what they cost

    def add(self, content: int, member: int, held_bytes: int) -> Charges:
        """One reference more of a member, to a content that takes `held_bytes`."""
        refs = self.refs[content]
        self.refs[content] = refs + 1
        self.references += 1
        holder = self._holder[content]
        if holder == member:
            return []
        if not refs:
            self._holder[content] = member
            return [(member, held_bytes)]
        if holder != _SEVERAL:
            self._holder[content] = _SEVERAL
            self._holders[content // _PART][content] = {holder: refs}
        counts = self._holders[content // _PART][content]
        before = dict(counts)
        counts[member] = counts.get(member, 0) + 1
        return _differences(held_bytes, before, refs, held_bytes, counts, refs + 1)

    def drop(self, content: int, member: int, held_bytes: int) -> Charges:
        """One reference less of a member; after the last one the content is no more, and the
        caller frees where it was."""
        refs = self.refs[content]
        self.refs[content] = refs - 1
        self.references -= 1
        if self._holder[content] == member:
            if refs > 1:
                return []
            self._remove(content)
            return [(member, -held_bytes)]
        counts = self._holders[content // _PART][content]
        before = dict(counts)
        counts[member] -= 1
        if not counts[member]:
            del counts[member]
        if len(counts) == 1:
            del self._holders[content // _PART][content]
            (self._holder[content],) = counts
        return _differences(held_bytes, before, refs, held_bytes, counts, refs - 1)

    def resize(self, content: int, old_bytes: int, new_bytes: int) -> Charges:
        """The content takes other bytes now: it was compressed, or compressed better."""
        counts = self.holders(content)
        refs = self.refs[content]
        return _differences(old_bytes, counts, refs, new_bytes, counts, refs)

    def holders(self, content: int) -> dict[int, int]:
        """References by member."""
        holder = self._holder[content]
        if holder == _SEVERAL:
            return dict(self._holders[content // _PART][content])
        return {holder: self.refs[content]} if holder != _NOBODY else {}

    # --- what is known about them

    @property
    def metadata_bytes(self) -> int:
        """What all of this takes in Python."""
        arrays = (self.location, self.refs, self._digest, self._next, self._holder, self._heads)
        dicts = [*self._holders, *(one for part in self._holders for one in part.values())]
        return sum(map(sys.getsizeof, arrays)) + sum(map(sys.getsizeof, dicts))

    def check(self, live: dict[int, tuple[int, dict[int, int]]]) -> None:
        """Raises InvariantError unless exactly the contents of `live` (number to location and
        references by member) are known, each once and in its bucket."""
        found = []
        for bucket, head in enumerate(self._heads):
            content = head
            while content >= 0:
                found.append(content)
                if len(found) > len(self.refs) or self._bucket(self._digest[content]) != bucket:
                    _fail(f"content {content} is in bucket {bucket}")
                content = self._next[content]
        if len(found) != self.count or set(found) != live.keys():
            _fail(f"{self.count} contents are counted, {len(found)} found, {len(live)} live")
        if len({self._digest[content] for content in found}) != len(found):
            _fail("two contents have one digest")
        for content, (location, holders) in live.items():
            if self.location[content] != location or self.holders(content) != holders:
                _fail(f"content {content} of {self.holders(content)}, not {holders}")
            if self.refs[content] != sum(holders.values()) or not self.refs[content]:
                _fail(f"content {content} counts {self.refs[content]} references")
        several = {content for content, (_, holders) in live.items() if len(holders) > 1}
        if {content for part in self._holders for content in part} != several:
            _fail("holders are kept of contents that have one holder or none")
        if self.references != sum(self.refs):
            _fail("references are miscounted")
        self._check_free(len(self.refs) - len(found))

    def _check_free(self, wanted: int) -> None:
        content = self._free
        free = 0
        while content >= 0 and free <= wanted:
            if self.refs[content] or self._holder[content] != _NOBODY:
                _fail(f"free number {content} is in use")
            free += 1
            content = self._next[content]
        if free != wanted:
            _fail(f"{free} numbers are free, not {wanted}")


def _differences(
    old_bytes: int,
    old: dict[int, int],
    old_refs: int,
    new_bytes: int,
    new: dict[int, int],
    new_refs: int,
) -> Charges:
    """How charges change from one set of holders to another."""
    changes = []
    for member in old | new:
        change = charge(new_bytes, new_refs, new.get(member, 0))
        change -= charge(old_bytes, old_refs, old.get(member, 0))
        if change:
            changes.append((member, change))
    return changes


def _fail(text: str) -> None:
    raise InvariantError(text)
