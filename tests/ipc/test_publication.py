"""A topic and a message as bytes, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.errors import FrameError
from prefork.ipc.publication import MOST_TOPIC, decode_publication, encode_publication, topic_of

topics = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
messages = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(topics, messages)
def test_what_is_published_comes_out_as_it_went_in(topic, message):
    """The router reads the topic alone, and finds the same one."""
    payload = encode_publication(topic, message)

    assert decode_publication(payload) == (topic, message)
    assert topic_of(payload) == topic


def test_the_layout_is_length_topic_json():
    """Another implementation could read it."""
    assert encode_publication("\u00e9t\u00e9", {"a": [1, "\u00e9"]}) == b'\x00\x05\xc3\xa9t\xc3\xa9{"a":[1,"\\u00e9"]}'


def test_the_longest_topic_passes_and_a_longer_one_does_not():
    """Its length is a number of 16 bits."""
    assert topic_of(encode_publication("x" * MOST_TOPIC, 1)) == "x" * MOST_TOPIC
    with pytest.raises(ValueError, match="65536 bytes of UTF-8: 1 to 65535"):
        encode_publication("x" * (MOST_TOPIC + 1), 1)
    with pytest.raises(ValueError, match="65536 bytes"):
        encode_publication("\u00e9" * 32768, 1)


@pytest.mark.parametrize("topic", ["", "\ud800"])
def test_a_topic_that_cannot_be_is_an_error_where_it_is_named(topic):
    """And not where it is routed."""
    with pytest.raises(ValueError):
        encode_publication(topic, 1)


def endless():
    message = []
    message.append(message)
    return message


def deep():
    message = []
    for _ in range(100_000):
        message = [message]
    return message


@pytest.mark.parametrize(
    "message", [b"bytes", {1, 2}, object(), endless(), deep(), {(1, 2): 3}], ids=lambda m: str(type(m))
)
def test_what_json_cannot_hold_is_a_type_error(message):
    """The publisher's mistake, told to the publisher."""
    with pytest.raises(TypeError):
        encode_publication("t", message)


@pytest.mark.parametrize("payload", [b"", b"\0", b"\0\0", b"\0\0{}", b"\0\x05abcd", b"\0\x01\xff1"])
def test_what_has_no_topic_is_a_frame_error(payload):
    """Whatever a process sends, it does not end the master."""
    with pytest.raises(FrameError):
        topic_of(payload)


@pytest.mark.parametrize("payload", [b"\0\x01t", b"\0\x01t{", b"\0\x01t\xff"])
def test_what_is_no_json_is_a_frame_error_for_subscribers_only(payload):
    """The router does not look."""
    assert topic_of(payload) == "t"
    with pytest.raises(FrameError, match="under 't' is not JSON"):
        decode_publication(payload)
