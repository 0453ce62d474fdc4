"""What is published: a topic and a message, as the payload of a PUBLISH frame.

The length of the topic, the topic, the message as JSON. Whoever routes it reads the topic and
passes the payload on as it came; only publishers and subscribers know the message.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from prefork.errors import FrameError

_LENGTH = struct.Struct("!H")

MOST_TOPIC = 0xFFFF  # bytes of UTF-8


def encode_topic(topic: str) -> bytes:
    """Raises ValueError for a topic that is empty, too long or no text."""
    encoded = topic.encode()
    if not 1 <= len(encoded) <= MOST_TOPIC:
        raise ValueError(f"a topic of {len(encoded)} bytes of UTF-8: 1 to {MOST_TOPIC} are allowed")
    return encoded


def encode_publication(topic: str, message: Any) -> bytes:
    """Raises ValueError for the topic, TypeError for a message that JSON cannot hold."""
    encoded = encode_topic(topic)
    try:
        text = json.dumps(message, separators=(",", ":"))
    except (ValueError, RecursionError) as error:  # it contains itself, or is nested too deeply
        raise TypeError(f"JSON cannot hold what is published under {topic!r}: {error}") from error
    return _LENGTH.pack(len(encoded)) + encoded + text.encode("ascii")


def topic_of(payload: bytes) -> str:
    """Raises FrameError for a payload that does not begin with a topic."""
    return _split(payload)[0]


def decode_publication(payload: bytes) -> tuple[str, Any]:
    """Topic and message. Raises FrameError."""
    topic, start = _split(payload)
    try:
        return topic, json.loads(payload[start:])
    except (ValueError, RecursionError) as error:
        raise FrameError(f"what was published under {topic!r} is not JSON: {error}") from error


def _split(payload: bytes) -> tuple[str, int]:
    """The topic, and where the message begins."""
    start = _LENGTH.size + int.from_bytes(payload[: _LENGTH.size], "big")
    encoded = payload[_LENGTH.size : start]
    if not encoded or len(payload) < start:
        raise FrameError(f"a publication of {len(payload)} bytes does not begin with a topic")
    try:
        return encoded.decode(), start
    except UnicodeDecodeError as error:
        raise FrameError(f"the topic of a publication is not UTF-8: {error}") from error
