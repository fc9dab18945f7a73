"""What must hold of a message whoever made it up: it is refused, or it means what it says."""

from __future__ import annotations

from fs.cluster import messages as cluster
from fs.dlm import codec
from fs.dlm.messages import FRAME_BYTES_MAX, MessageError


def lock_frame_is_taken(untrusted: bytes) -> bool:
    """Whether a frame of the lock manager is taken; then it says the same when it is said again."""
    try:
        frame = codec.decode(untrusted)
    except MessageError:
        return False
    if frame.message is None:
        assert frame.sequence == 0, "a frame without a message"
        return True
    kind, body = codec.encode(frame.message)
    again = codec.encode_frame(frame.epoch, frame.sequence, frame.acknowledged, kind, body)
    assert len(again) <= FRAME_BYTES_MAX, "a frame that grows"
    assert codec.decode(again) == frame, "a frame that says something else the second time"
    return True


def membership_message_is_taken(untrusted: bytes) -> bool:
    """The same of a message of membership; a text may have lost what is no text."""
    try:
        message = cluster.decode(untrusted)
    except ValueError:
        return False
    again = cluster.decode(cluster.encode(message))
    assert again == message or message.kind is cluster.Kind.REFUSE, "another message"
    assert len(message.text) <= cluster.MAX_TEXT_BYTES, "a long text"
    return True
