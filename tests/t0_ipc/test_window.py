"""The shared info page: what the guest reads is one state that the hypervisor wrote, whole."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from ipc import window as window_module
from ipc.window import (
    BALLOON_PAGES_MAX,
    NOTIFICATIONS_MASK,
    SHARED_INFO,
    SharedInfo,
    Window,
    anonymous_window,
    create_window,
    map_window,
)
from tests.support.kills import bytecodes_of, killed_at, traced
from tools.abi_document import module_strings, struct_fields

WRITER: set[str | None] = {window_module.__file__}
OLD = SharedInfo(7, NOTIFICATIONS_MASK, BALLOON_PAGES_MAX, 256)
NEW = SharedInfo(7, 0, 1, 2)
"""The count wraps, and no half of a wish is that of another state."""


@pytest.fixture
def window() -> Iterator[Window]:
    """One in which the old state stands."""
    one = anonymous_window()
    publish(one, OLD)
    yield one
    one.close()


def publish(window: Window, info: SharedInfo) -> None:
    """As the hypervisor does before it hands the window over."""
    window.publish_info(
        info.generation,
        notifications=info.notifications,
        balloon_target_pages=info.balloon_target_pages,
        writeback_pages=info.writeback_pages,
    )


def notify(window: Window, info: SharedInfo) -> None:
    """As it does afterwards."""
    window.notify(
        info.notifications,
        balloon_target_pages=info.balloon_target_pages,
        writeback_pages=info.writeback_pages,
    )


def test_a_window_that_nobody_wrote_to_wishes_nothing() -> None:
    """That of the local transport."""
    window = anonymous_window()

    assert window.info() == (0, 0, 0, 0)
    window.close()


@pytest.mark.parametrize(
    "info",
    [OLD, NEW, SharedInfo(1, 0, 0, 0), SharedInfo(0xFFFF_FFFF, 1, 0, 0)],
    ids=["most", "each its own", "none", "generation"],
)
def test_what_was_written_is_read_through_the_guests_mapping(info: SharedInfo) -> None:
    """Each field by itself, at its bounds."""
    ours = create_window()
    guests = map_window(ours.fd)
    ours.fd = -1

    publish(ours, info)
    assert guests.info() == info
    notify(ours, SharedInfo(info.generation, 5, 6, 7))
    assert guests.info() == (info.generation, 5, 6, 7)
    ours.close()
    guests.close()


def test_the_bytes_are_those_of_the_document(window: Window) -> None:
    """`notify` and `info` do without the struct that ABI.md is made from."""
    notify(window, SharedInfo(7, 0x1234, 0x89ABCDEF, 0x0100))
    fields = struct_fields(SHARED_INFO, module_strings(window_module)["SHARED_INFO"])
    page = bytes(window._view[: SHARED_INFO.size])

    found = dict(zip((field.name for field in fields), SHARED_INFO.unpack(page), strict=True))
    assert found == {
        "magic": b"TMWI",
        "generation": 7,
        "notifications": 0x1234,
        "writeback pages": 0x0100,
        "balloon target": 0x89ABCDEF,
        "spare": bytes(16),
    }
    assert all(field.text for field in fields)
    word = struct.unpack_from("<Q", page, 8)[0]
    assert word == 0x89ABCDEF_0100_1234


def test_a_count_beyond_its_width_wraps(window: Window) -> None:
    """The hypervisor counts on; the wishes beside it stay what they are."""
    notify(window, SharedInfo(7, NOTIFICATIONS_MASK + 3, 1, 4))

    assert window.info() == (7, 2, 1, 4)


def test_a_writer_killed_anywhere_leaves_a_whole_state(window: Window) -> None:
    """Before each of its bytecodes."""
    steps = bytecodes_of(WRITER, lambda: notify(window, NEW))
    left = set()
    for step in range(steps):
        publish(window, OLD)
        assert killed_at(step, WRITER, lambda: notify(window, NEW))
        left.add(window.info())

    assert left == {OLD, NEW}


def test_a_read_into_which_a_write_falls_is_whole(window: Window) -> None:
    """A write before each of the reader's bytecodes."""
    found: list[SharedInfo] = []
    for at in range(bytecodes_of(WRITER, window.info)):
        publish(window, OLD)
        left = at

        def write_when_due() -> None:
            nonlocal left
            if left == 0:
                notify(window, NEW)
            left -= 1

        with traced(WRITER, write_when_due):
            found.append(window.info())

    assert set(found) == {OLD, NEW}
