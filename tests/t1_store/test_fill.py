"""Same-filled pages: none is missed, none is taken for one that it is not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.fill import candidates, page_of, pattern_of
from ipc.abi import EXTENT_PAGES_MAX, PAGE_BYTES

WORDS = st.one_of(
    st.sampled_from((0, 1, 2**64 - 1, 0x0101010101010101, 1 << 63)), st.integers(0, 2**64 - 1)
)


def bits(bitmap: int) -> set[int]:
    """The numbers of the bits that are set."""
    return {bit for bit in range(bitmap.bit_length()) if bitmap >> bit & 1}


def noise(seed: int) -> bytes:
    """A page of which no two words are alike."""
    return random.Random(seed).randbytes(PAGE_BYTES)


@given(WORDS)
def test_a_page_of_one_word_comes_back(pattern: int) -> None:
    """Byte for byte."""
    page = page_of(pattern)

    assert len(page) == PAGE_BYTES
    assert page == pattern.to_bytes(8, "little") * 512
    assert pattern_of(page) == pattern


@given(WORDS, st.integers(0, PAGE_BYTES - 1), st.integers(1, 255))
def test_a_page_with_one_byte_wrong_is_not_same_filled(pattern: int, at: int, change: int) -> None:
    """Wherever the byte is."""
    page = bytearray(page_of(pattern))
    page[at] ^= change

    assert pattern_of(bytes(page)) is None


@given(
    slot=st.integers(0, 5),
    pages=st.lists(st.one_of(WORDS, st.none()), min_size=1, max_size=EXTENT_PAGES_MAX),
    seed=st.integers(0, 1000),
)
def test_every_same_filled_page_of_an_extent_is_a_candidate(
    slot: int, pages: list[int | None], seed: int
) -> None:
    """And no page of noise is, whatever lies before and behind."""
    rows = [noise(seed + n) if word is None else page_of(word) for n, word in enumerate(pages)]
    window = page_of(7) * slot + b"".join(rows) + page_of(8)

    found = candidates(memoryview(window).cast("Q"), slot, len(pages))

    assert bits(found) == {n for n, word in enumerate(pages) if word is not None}


@pytest.mark.parametrize("count", [1, 2, 8, 9, 63, 64])
def test_candidates_are_few_but_may_be_wrong(count: int) -> None:
    """The ends of a page decide; the rest is looked at in a copy."""
    alike = bytearray(noise(1))
    alike[-8:] = alike[:8]
    first_byte_only = bytearray(noise(2))
    first_byte_only[-8] = first_byte_only[0]
    window = bytes(alike) + bytes(first_byte_only) * 63

    found = candidates(memoryview(window).cast("Q"), 0, count)

    assert found == 1
    assert pattern_of(bytes(alike)) is None
