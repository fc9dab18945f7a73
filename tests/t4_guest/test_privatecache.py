"""Private pools of a clustered file system: a page's name holds the token of its file's lock."""

from __future__ import annotations

import random

from fs.hooks import Extent, FileKey
from guests.privatecache import TokenNames, _renamed
from ipc.abi import PAGE_BYTES

KEY = FileKey(70, 9)
OTHER = FileKey(71, 9)


class Shelf:
    """A `PageHooks` that keeps everything, for ever."""

    def __init__(self) -> None:
        self.pages: dict[tuple[FileKey, int], bytes] = {}
        self.flushes = 0

    def get_pages(self, key: FileKey, index: int, count: int, into: memoryview) -> int:
        found = 0
        for number in range(count):
            page = self.pages.get((key, index + number))
            if page is not None:
                into[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = page
                found |= 1 << number
        return found

    def put_pages(
        self,
        key: FileKey,
        index: int,
        count: int,
        pages: memoryview,
        *,
        active: bool = False,
    ) -> None:
        for number in range(count):
            page = bytes(pages[number * PAGE_BYTES : (number + 1) * PAGE_BYTES])
            self.pages[key, index + number] = page

    def put_extents(self, extents: object, pages: memoryview) -> None:
        at = 0
        assert isinstance(extents, list)
        for key, start, length, _ in extents:
            self.put_pages(key, start, length, pages[at * PAGE_BYTES :])
            at += length

    def flush_page(self, key: FileKey, index: int) -> None:
        self.pages.pop((key, index), None)

    def flush_inode(self, key: FileKey) -> None:
        self.pages = {place: page for place, page in self.pages.items() if place[0] != key}

    def flush_fs(self) -> None:
        self.flushes += 1
        self.pages.clear()


class Node:
    """A shelf behind tokens."""

    def __init__(self) -> None:
        self.tokens: dict[FileKey, int] = {}
        self.shelf = Shelf()
        self.names = TokenNames(self.shelf, self.tokens.get)

    def put(self, key: FileKey, index: int, byte: int) -> None:
        self.names.put_pages(key, index, 1, memoryview(bytes([byte]) * PAGE_BYTES))

    def get(self, key: FileKey, index: int) -> int | None:
        into = bytearray(PAGE_BYTES)
        return into[0] if self.names.get_pages(key, index, 1, memoryview(into)) else None


def test_page_from_before_another_nodes_grant_is_never_found() -> None:
    """It is still there, but nobody asks for it any more."""
    node = Node()
    node.tokens[KEY] = 1 << 32 | 4
    node.put(KEY, 0, 7)
    assert node.get(KEY, 0) == 7
    node.tokens[KEY] += 1
    assert node.get(KEY, 0) is None
    assert node.shelf.pages
    node.put(KEY, 0, 8)
    assert node.get(KEY, 0) == 8
    # The next epoch of the lock manager begins above all tokens of this one.
    node.tokens[KEY] = 2 << 32
    assert node.get(KEY, 0) is None


def test_without_the_lock_nothing_is_put_got_or_flushed() -> None:
    """A token of 0 or None is no lock in good standing."""
    node = Node()
    node.tokens[KEY] = 5
    node.put(KEY, 0, 7)
    for token in (0, None):
        if token is None:
            del node.tokens[KEY]
        else:
            node.tokens[KEY] = token
        node.put(KEY, 1, 8)
        assert node.get(KEY, 0) is node.get(KEY, 1) is None
        node.names.flush_page(KEY, 0)
        node.names.flush_inode(KEY)
    extents = [Extent(OTHER, 0, 1, active=False), Extent(KEY, 0, 1, active=False)]
    node.tokens[OTHER] = 3
    node.names.put_extents(extents, memoryview(bytes(2 * PAGE_BYTES)))
    assert len(node.shelf.pages) == 1
    node.tokens[KEY] = 5
    assert node.get(KEY, 0) == 7


def test_flushes_take_what_the_token_names() -> None:
    """A page, a file, everything."""
    node = Node()
    node.tokens |= {KEY: 5, OTHER: 6}
    pages = memoryview(bytes([1]) * PAGE_BYTES * 3)
    node.names.put_extents(
        [Extent(KEY, 0, 2, active=False), Extent(OTHER, 4, 1, active=False)], pages
    )
    node.names.flush_page(KEY, 0)
    assert [node.get(KEY, 0), node.get(KEY, 1), node.get(OTHER, 4)] == [None, 1, 1]
    node.names.flush_inode(KEY)
    assert [node.get(KEY, 1), node.get(OTHER, 4)] == [None, 1]
    node.names.flush_fs()
    assert node.get(OTHER, 4) is None
    assert node.shelf.flushes == 1


def test_names_of_different_tokens_differ() -> None:
    """Of one file: every pair of epoch and counter has a name of its own."""
    seed = random.randrange(2**32)
    choose = random.Random(seed)
    tokens = {choose.randrange(1, 50) << 32 | choose.randrange(1, 2**32) for _ in range(2000)}
    tokens |= {epoch << 32 | counter for epoch in range(1, 40) for counter in range(1, 40)}
    names = {_renamed(key, token) for key in (KEY, OTHER) for token in tokens}
    assert len(names) == 2 * len(tokens), f"seed {seed}"
