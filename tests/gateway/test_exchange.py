"""One request and its response, as the gateways see it: feeding, reading, waiting, answering."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.errors import ClientDisconnected, GatewayError, ResponseError
from prefork.gateway.exchange import BODY_HIGH_WATER, BODY_LOW_WATER, Exchange
from prefork.protocol.events import Request
from tests.harness.loop import go

# ---- reading ----


def test_read_hands_out_pieces_in_order_and_then_nothing(exchange_for):
    """b"" is the end, as for a file, and stays the end."""
    exchange = exchange_for("POST", body=[b"ab", b"c"])

    async def run():
        return [await exchange.read() for _ in range(4)]

    assert go(run()) == [b"ab", b"c", b"", b""]


def test_read_of_a_request_without_body_is_empty_at_once(exchange_for):
    """A GET must not wait for anything."""
    exchange = exchange_for("GET")

    assert go(exchange.read()) == b""
    assert not exchange.has_unread_body


def test_unread_body_ends_with_the_last_piece(exchange_for):
    """A gateway tells the application "no more" together with the last piece, not one call later."""
    exchange = exchange_for("POST", body=[b"ab", b"c"])

    async def run():
        seen = [exchange.has_unread_body]
        for _ in range(2):
            await exchange.read()
            seen.append(exchange.has_unread_body)
        return seen

    assert go(run()) == [True, True, False]


def test_unread_body_ends_when_the_end_comes_after_the_last_piece_was_read(exchange_for):
    """A chunked body's end is a message of its own: then no further read is needed to keep the connection."""
    exchange = exchange_for("POST", chunked=True)
    exchange.feed(b"ab")

    go(exchange.read())
    assert exchange.has_unread_body
    exchange.feed_end()
    assert not exchange.has_unread_body


def test_a_reader_that_waits_is_woken_by_a_piece(exchange_for):
    """The usual order of an upload: the application is faster than the client."""
    exchange = exchange_for("POST", content_length=2)

    async def run():
        reader = asyncio.create_task(exchange.read())
        await asyncio.sleep(0)
        exchange.feed(b"ab")
        return await reader

    assert go(run()) == b"ab"


def test_two_readers_share_the_pieces_and_none_is_lost(exchange_for):
    """ASGI lets two tasks call receive; both wake for one piece, and only one may have it."""
    exchange = exchange_for("POST", chunked=True)

    async def run():
        readers = [asyncio.create_task(exchange.read()) for _ in range(3)]
        await asyncio.sleep(0)
        exchange.feed(b"a")
        await asyncio.sleep(0)
        exchange.feed(b"b")
        await asyncio.sleep(0)
        exchange.feed_end()
        return sorted(await asyncio.gather(*readers))

    assert go(run()) == [b"", b"a", b"b"]


def test_a_cancelled_reader_takes_nothing_and_leaves_the_others_waiting(exchange_for):
    """Frameworks poll for the disconnect with a receive that they cancel."""
    exchange = exchange_for("POST", chunked=True)

    async def run():
        first, second = (asyncio.create_task(exchange.read()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        exchange.feed(b"a")
        return await second

    assert go(run()) == b"a"


def test_continue_is_asked_for_only_by_a_read_that_has_to_wait(exchange_for, wire):
    """RFC 9110, 10.1.1: a server that already has the body should not send 100."""
    here = exchange_for("POST", body=b"ab", expect_continue=True)
    go(here.read())
    assert wire.count("continue") == 0

    awaited = exchange_for("POST", content_length=2, expect_continue=True)

    async def run():
        reader = asyncio.create_task(awaited.read())
        await asyncio.sleep(0)
        assert wire.count("continue") == 1
        awaited.feed(b"ab")
        await reader

    go(run())


def test_continue_is_not_asked_for_unless_the_body_is_read(exchange_for, wire):
    """An application that refuses by the head alone spares the client its upload."""
    exchange = exchange_for("POST", content_length=2, expect_continue=True)
    exchange.start(403, [])
    exchange.send(b"no", False)

    assert wire.count("continue") == 0


# ---- back-pressure ----


def test_wire_is_paused_once_at_the_high_water_mark_and_resumed_once_at_the_low_one(exchange_for, wire):
    """Each pause and each resume is a system call, so a piece in between must cost none."""
    exchange = exchange_for("POST", chunked=True)
    piece = b"x" * BODY_LOW_WATER

    async def run():
        for _ in range(BODY_HIGH_WATER // BODY_LOW_WATER + 2):
            exchange.feed(piece)
        assert wire.calls == [("pause",)]
        while exchange._buffered:
            await exchange.read()
        assert wire.calls == [("pause",), ("resume",)]

    go(run())


def test_one_piece_above_the_mark_is_paused_and_resumed(exchange_for, wire):
    """A single large read from the socket may pass the mark at once."""
    exchange = exchange_for("POST", chunked=True)
    exchange.feed(b"x" * (BODY_HIGH_WATER + 1))
    assert wire.calls == [("pause",)]

    go(exchange.read())
    assert wire.calls == [("pause",), ("resume",)]


def test_reading_without_a_pause_resumes_nothing(exchange_for, wire):
    """The wire may have paused for a reason of its own; that is not the exchange's to undo."""
    exchange = exchange_for("POST", chunked=True)
    exchange.feed(b"ab")
    go(exchange.read())

    assert wire.calls == []


def test_the_end_of_the_body_resumes_a_paused_wire(exchange_for, wire):
    """A transport that stays paused never notices that its client left.

    It used to stay paused for good when a body above the mark was complete before the application read it.
    """
    exchange = exchange_for("POST", content_length=BODY_HIGH_WATER)
    exchange.feed(b"x" * BODY_HIGH_WATER)
    exchange.feed_end()

    assert wire.calls == [("pause",), ("resume",)]


def test_body_after_the_response_is_dropped(exchange_for, wire):
    """Nobody reads it any more: it must neither fill memory nor pause a wire that drains it."""
    exchange = exchange_for("POST", chunked=True)
    exchange.start(200, [])
    exchange.send(b"done", False)
    exchange.feed(b"x" * BODY_HIGH_WATER)

    assert wire.count("pause") == 0
    assert exchange._buffered == 0


@given(st.lists(st.one_of(st.none(), st.integers(1, 3 * BODY_HIGH_WATER // 2)), max_size=40))
def test_pauses_and_resumes_alternate_and_match_what_is_buffered(steps):
    """Whatever the order of feeding and reading: a paused wire with an empty buffer would hang the upload."""
    calls = []

    class Wire:
        def pause_body(self):
            calls.append("pause")

        def resume_body(self):
            calls.append("resume")

    exchange = Exchange(
        Request("POST", b"/", b"/", b"", "1.1", [], chunked=True), Wire(), client=None, server=None, scheme="http"
    )

    async def run():
        held = []
        for size in steps:
            if size is not None:
                exchange.feed(bytes(size))
                held.append(size)
            elif held:
                assert len(await exchange.read()) == held.pop(0)
            is_paused = calls.count("pause") > calls.count("resume")
            if sum(held) >= BODY_HIGH_WATER:
                assert is_paused
            if sum(held) <= BODY_LOW_WATER:
                assert not is_paused

    go(run())
    assert calls == ["pause", "resume"] * (len(calls) // 2) + ["pause"] * (len(calls) % 2)


# ---- the client leaves ----


def test_disconnect_wakes_everyone(exchange_for):
    """Readers, and those who wait for nothing but the disconnect."""
    exchange = exchange_for("POST", content_length=5)

    async def run():
        waiting = [asyncio.create_task(exchange.read()) for _ in range(2)]
        leaving = asyncio.create_task(exchange.disconnected())
        await asyncio.sleep(0)
        exchange.disconnect()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        await leaving
        return results

    assert [type(each) for each in go(run())] == [ClientDisconnected, ClientDisconnected]


def test_pieces_that_arrived_before_the_disconnect_are_still_read(exchange_for):
    """A client that sends and closes has sent all the same."""
    exchange = exchange_for("POST", content_length=5)
    exchange.feed(b"ab")
    exchange.disconnect()

    async def run():
        assert await exchange.read() == b"ab"
        with pytest.raises(ClientDisconnected):
            await exchange.read()

    go(run())


def test_a_complete_body_is_read_after_the_disconnect(exchange_for):
    """Only an incomplete one is an error."""
    exchange = exchange_for("POST", body=b"ab")
    exchange.disconnect()

    async def run():
        return [await exchange.read(), await exchange.read()]

    assert go(run()) == [b"ab", b""]


def test_a_reader_that_waits_is_woken_when_the_response_is_complete(exchange_for):
    """The rest of the body is not fed then, so it used to wait until the connection closed."""
    exchange = exchange_for("POST", content_length=5)

    async def run():
        reader = asyncio.create_task(exchange.read())
        await asyncio.sleep(0)
        exchange.start(413, [])
        exchange.send(b"", False)
        with pytest.raises(ClientDisconnected):
            await reader

    go(run())


def test_disconnected_returns_when_the_response_is_complete(exchange_for):
    """ASGI: `http.disconnect` is sent if receive is called after a response has been sent."""
    exchange = exchange_for()

    async def run():
        waiting = asyncio.create_task(exchange.disconnected())
        await asyncio.sleep(0)
        assert not waiting.done()
        exchange.start(200, [])
        exchange.send(b"", False)
        await waiting

    go(run())


def test_send_to_a_client_that_left_raises(exchange_for, wire):
    """The wire knows, and what it raises comes through."""
    exchange = exchange_for()
    exchange.start(200, [])
    wire.leave()

    with pytest.raises(ClientDisconnected):
        exchange.send(b"x", True)


def test_a_client_that_closed_its_sending_half_gets_its_response(exchange_for, wire):
    """`printf ... | nc`: the end of its input looks like leaving, and it still reads."""
    exchange = exchange_for()
    exchange.disconnect()
    exchange.start(200, [])
    exchange.send(b"x", False)

    assert wire.body == b"x"


def test_reading_what_is_left_after_the_response_resumes_nothing(exchange_for, wire):
    """The wire may be in its next exchange by then, paused for that one's sake."""
    exchange = exchange_for("POST", chunked=True)
    exchange.feed(b"x" * BODY_HIGH_WATER)
    exchange.start(200, [])
    exchange.send(b"", False)
    go(exchange.read())

    assert wire.count("resume") == 0


# ---- answering ----


def test_head_waits_for_the_first_piece(exchange_for, wire):
    """An ordinary answer is one write."""
    exchange = exchange_for()
    exchange.start(200, [(b"a", b"b")])
    assert wire.calls == []

    exchange.send(b"x", True)
    exchange.send(b"y", False)
    assert wire.calls == [("head", 200, [(b"a", b"b")], b"x", True), ("body", b"y", False)]


def test_an_unsent_head_may_be_replaced_and_a_sent_one_may_not(exchange_for, wire):
    """PEP 3333's exc_info, and the 500 of an application that failed."""
    exchange = exchange_for()
    exchange.start(200, [])
    exchange.start(404, [])
    exchange.send(b"", True)

    assert wire.status == 404
    with pytest.raises(GatewayError, match="already started with status 404"):
        exchange.start(200, [])


def test_body_out_of_turn_is_refused(exchange_for):
    """Before the head, and after the end."""
    exchange = exchange_for()
    with pytest.raises(GatewayError, match="before the response was started"):
        exchange.send(b"x", False)

    exchange.start(200, [])
    exchange.send(b"x", False)
    with pytest.raises(GatewayError, match="after the response was complete"):
        exchange.send(b"x", False)


def test_write_waits_while_the_client_is_slow(exchange_for, wire):
    """Otherwise a large download would lie in memory."""
    exchange = exchange_for()
    exchange.start(200, [])
    wire.writable = False

    async def run():
        writing = asyncio.create_task(exchange.write(b"x", True))
        await wire.is_draining.wait()
        assert not writing.done()
        wire.take()
        await writing

    go(run())


def test_write_does_not_wait_while_the_client_keeps_up(exchange_for, wire):
    """Drain is for slow clients; the ordinary answer must not pay for it."""
    exchange = exchange_for()
    exchange.start(200, [])
    go(exchange.write(b"x", False))

    assert wire.count("drain") == 0


# ---- failing ----


def test_fail_before_anything_was_sent_answers_500(exchange_for, wire):
    """Also when the application had started a response that did not leave yet."""
    exchange = exchange_for()
    exchange.start(200, [(b"content-type", b"image/png")])
    exchange.fail()

    assert (wire.status, wire.body, wire.complete) == (500, b"Internal Server Error", True)
    assert wire.header(b"content-type") == [b"text/plain; charset=utf-8"]
    assert exchange.status == 500


def test_fail_after_a_head_that_http_forbids_answers_500(exchange_for, wire):
    """Nothing of it left, so the client deserves an answer. It used to be cut off instead."""
    exchange = exchange_for()
    exchange.start(200, [(b"content-length", b"2")])
    wire.refuse = ResponseError("the body is shorter than its content-length of 2 by 1 bytes")

    with pytest.raises(ResponseError):
        exchange.send(b"x", False)
    exchange.fail()

    assert wire.status == 500
    assert wire.count("abort") == 0


def test_fail_after_the_head_cuts_the_connection(exchange_for, wire):
    """A truncated body must not pass for a whole one."""
    exchange = exchange_for()
    exchange.start(200, [])
    exchange.send(b"x", True)
    exchange.fail()

    assert wire.calls[-1] == ("abort",)


def test_fail_after_the_end_changes_nothing(exchange_for, wire):
    """The client has its answer; what failed came after it."""
    exchange = exchange_for()
    exchange.start(200, [])
    exchange.send(b"x", False)
    calls = list(wire.calls)
    exchange.fail()

    assert wire.calls == calls


def test_fail_without_a_client_is_silent(exchange_for, wire):
    """The worker calls it at its one door and has nothing to catch what it might raise."""
    exchange = exchange_for()
    wire.leave()
    exchange.fail()

    assert wire.calls == []
