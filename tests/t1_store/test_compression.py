"""Compression: pages come back, damage is noticed or harmless, effort is bounded."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.compression import (
    CODECS,
    LZ4,
    LZ4HC,
    NONE,
    POOR_STREAK,
    SAMPLE_EVERY,
    Codec,
    Compressor,
    decompress,
    recompress,
)
from hypervisor.slab import BACK_BYTES, SIZE_MAX, class_bytes
from ipc.abi import PAGE_BYTES


def text(seed: int) -> bytes:
    """A page that compresses to about a half."""
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randint(3, 9)) for _ in range(150)]
    return b" ".join(rng.choices(words, k=PAGE_BYTES))[:PAGE_BYTES]


def noise(seed: int) -> bytes:
    """A page that does not compress."""
    return random.Random(seed).randbytes(PAGE_BYTES)


@pytest.mark.parametrize("codec", CODECS, ids=[codec.name for codec in CODECS])
@pytest.mark.parametrize("page", [bytes(PAGE_BYTES), text(1), noise(1)], ids=["0", "text", "noise"])
def test_every_codec_gives_the_page_back(codec: Codec, page: bytes) -> None:
    """Also where it had better not be used."""
    assert decompress(codec.number, codec.compress(page)) == page


def test_codecs_are_found_by_their_number() -> None:
    """It is in the segment: it must not change its meaning."""
    assert (NONE.number, LZ4.number, LZ4HC.number) == (0, 1, 2)
    assert all(CODECS[codec.number] is codec for codec in CODECS)


@given(st.sampled_from(CODECS), st.data())
def test_damaged_bytes_give_a_page_or_none(codec: Codec, data: st.DataObject) -> None:
    """No exception, no page of another length; a flipped bit in a literal can't be noticed."""
    compressed = bytearray(codec.compress(text(data.draw(st.integers(0, 50)))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(compressed) - 1))
        compressed[at] ^= data.draw(st.integers(1, 255))

    page = decompress(codec.number, bytes(compressed))

    assert page is None or len(page) == PAGE_BYTES


@given(st.binary(max_size=5000))
def test_any_bytes_give_a_page_or_none(data: bytes) -> None:
    """The output is bounded whatever the input says."""
    for codec in CODECS:
        page = decompress(codec.number, data)
        assert page is None or len(page) == PAGE_BYTES


@pytest.mark.parametrize("codec", CODECS, ids=[codec.name for codec in CODECS])
@pytest.mark.parametrize("length", [0, 1, PAGE_BYTES - 1, PAGE_BYTES + 1, 3 * PAGE_BYTES])
def test_what_is_no_page_long_is_damaged(codec: Codec, length: int) -> None:
    """Too short and too long alike."""
    assert decompress(codec.number, codec.compress(bytes(length))) is None


def test_a_page_is_kept_compressed_if_it_fits_a_class() -> None:
    """Else it is poor, and counted."""
    compressor = Compressor()
    nearly = text(1)[: PAGE_BYTES // 2] + noise(1)[: PAGE_BYTES // 2]

    for page in (text(1), bytes(PAGE_BYTES), nearly):
        data = compressor.compress(page)
        assert (data is not None) == (len(LZ4.compress(page)) + BACK_BYTES <= SIZE_MAX)
        if data is not None:
            assert decompress(LZ4.number, data) == page
    poor = compressor.poor
    assert compressor.compress(noise(1)) is None

    assert compressor.poor == poor + 1
    assert compressor.kept + compressor.poor == 4
    assert compressor.skipped == 0


def test_a_guest_of_poor_pages_is_sampled_until_one_is_good() -> None:
    """One in SAMPLE_EVERY is tried; the first good one ends it."""
    compressor = Compressor()
    pages = POOR_STREAK + 10 * SAMPLE_EVERY
    for seed in range(pages):
        assert compressor.compress(noise(seed)) is None
    assert compressor.poor + compressor.skipped == pages
    assert compressor.poor == POOR_STREAK + 10

    tries = 1
    while compressor.compress(text(1)) is None:
        tries += 1

    assert tries <= SAMPLE_EVERY
    assert all(compressor.compress(text(seed)) is not None for seed in range(20))


def test_now_and_then_a_poor_page_stops_no_compression() -> None:
    """Only an unbroken streak does."""
    compressor = Compressor()
    for round_ in range(10):
        for seed in range(POOR_STREAK - 1):
            compressor.compress(noise(seed))
        assert compressor.compress(text(round_)) is not None
    assert compressor.skipped == 0


def test_a_page_is_compressed_again_only_into_a_smaller_class() -> None:
    """A byte less would free nothing."""
    gained = 0
    for seed in range(20):
        page = text(seed)
        length = len(LZ4.compress(page))
        data = recompress(page, length)
        if data is not None:
            gained += 1
            assert decompress(LZ4HC.number, data) == page
            assert class_bytes(len(data)) < class_bytes(length)
        else:
            assert class_bytes(len(LZ4HC.compress(page))) >= class_bytes(length)
    assert gained
    assert recompress(text(1), 1) is None
