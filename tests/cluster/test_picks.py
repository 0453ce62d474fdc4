"""Picks alone: values in, a choice out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.cluster.picks import (
    LATE,
    Candidate,
    Custom,
    LeastBusy,
    LeastConnections,
    Offer,
    RoundRobin,
    Sticky,
    make_pick,
    sticky,
)
from prefork.errors import ConfigError


@dataclass(eq=False)
class Stats:
    opened: int = 0
    closed: int = 0
    in_flight: int = 0
    beat: float = 0.0
    lag: float = 0.0


@dataclass(eq=False)
class Handle:
    id: int
    slot: int
    stats: Stats = field(default_factory=Stats)


def workers(count, **stats):
    return [Candidate(Handle(number + 1, number, Stats(**stats))) for number in range(count)]


def offer(client=("192.0.2.1", 4711), head=b"", number=1):
    return Offer(number, -1, 0, client, ("0.0.0.0", 80), head)


def head(*lines):
    return "\r\n".join(["GET / HTTP/1.1", "Host: test", *lines, "", ""]).encode()


def picked(pick, candidates, **what):
    return pick.choose(offer(**what), candidates).handle.id


# ---- by load ----


def test_least_connections_takes_equals_in_turn():
    """Otherwise the first worker would get every connection of an idle server."""
    candidates = workers(3)
    for candidate, turn in zip(candidates, (2, 1, 3), strict=True):
        candidate.last_turn = turn

    assert picked(LeastConnections(), candidates) == 2


def test_load_does_not_lag_behind_the_scoreboard():
    """What was given and is not opened yet counts; what was opened without us counts too, once."""
    [candidate] = workers(1)
    candidate.given, candidate.handle.stats.opened, candidate.handle.stats.closed = 5, 3, 1
    assert candidate.load == 4
    candidate.handle.stats.opened = 9  # four of them came another way
    assert candidate.load == 8
    candidate.given = 7

    assert candidate.load == 10


@pytest.mark.parametrize(
    ("lag", "overdue", "late"), [(0, 0, False), (LATE / 2, 0, False), (2 * LATE, 0, True), (0, 2 * LATE, True)]
)
def test_least_busy_avoids_a_loop_that_is_held_up(lag, overdue, late):
    """Whether it said so with its last beat, or there was none since."""
    first, second = workers(2, beat=999.9)
    first.handle.stats.lag = lag
    first.handle.stats.beat -= overdue
    second.handle.stats.in_flight = 5  # which counts less

    assert picked(LeastBusy(lambda: 1000.0), [first, second]) == (2 if late else 1)


def test_least_busy_does_not_take_a_worker_without_a_heartbeat_for_a_late_one():
    """One that has only just begun to listen has not beaten yet."""
    first, second = workers(2)
    second.handle.stats.beat = 999.95
    second.handle.stats.in_flight = 1

    assert picked(LeastBusy(lambda: 1000.0), [first, second]) == 1


def test_least_busy_looks_at_requests_first_and_at_connections_then():
    """Kept-alive connections that are idle cost nothing; one on its way will bring a request."""
    first, second, third = workers(3)
    first.given, second.given = 10, 20
    second.handle.stats.opened = 20
    third.unacknowledged[1] = offer()
    pick = LeastBusy()
    assert picked(pick, [first, second, third]) == 1
    first.handle.stats.in_flight = 1

    assert picked(pick, [first, second, third]) == 2


def test_round_robin_is_exactly_even():
    """Whatever the load."""
    candidates = workers(3)
    candidates[0].given = 100
    pick = RoundRobin()

    assert [picked(pick, candidates) for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]


def test_round_robin_goes_on_where_it_was_when_workers_come_and_go():
    """A newcomer has its turn, and no more than that; the dead are forgotten."""
    first, second, third, fourth = workers(4)
    pick = RoundRobin()
    assert [picked(pick, [first, second, third]) for _ in range(4)] == [1, 2, 3, 1]

    assert [picked(pick, [second, third, fourth]) for _ in range(6)] == [4, 2, 3, 4, 2, 3]
    assert sorted(pick._turns) == [2, 3, 4]


# ---- sticky ----

KEYS = [(f"192.0.2.{number}", 4711) for number in range(256)]


def placed(pick, candidates):
    """Which slot each of 256 clients goes to."""
    return {client: pick.choose(offer(client), candidates).handle.slot for client in KEYS}


def test_the_same_address_goes_to_the_same_worker_whatever_its_port_and_load():
    """For a session that lives in one worker's memory any other is the wrong one."""
    candidates = workers(4)
    pick = sticky(by="ip")
    first = picked(pick, candidates, client=("192.0.2.7", 1))
    candidates[first - 1].given = 1000
    for candidate in candidates:
        candidate.last_turn = -candidate.handle.id

    assert {picked(pick, candidates, client=("192.0.2.7", port)) for port in range(2, 50)} == {first}
    assert picked(pick, list(reversed(candidates)), client=("192.0.2.7", 1)) == first


def test_an_address_is_the_same_on_a_socket_of_both_ipv4_and_ipv6():
    """There it is written in another way."""
    candidates = workers(4)

    for address, port in KEYS:
        mapped = picked(sticky(), candidates, client=(f"::ffff:{address}", port))
        assert mapped == picked(sticky(), candidates, client=(address, port))


def test_a_replacement_inherits_the_clients_of_its_slot():
    """They are bound to the place, not to the process."""
    candidates = workers(4)
    pick = sticky()
    before = placed(pick, candidates)
    candidates[2] = Candidate(Handle(99, 2))

    assert placed(pick, candidates) == before
    assert len(Counter(before.values())) == 4


@given(st.integers(1, 8), st.data())
def test_when_a_slot_goes_only_its_own_clients_move(count, data):
    """And when it comes back they return: nobody else's session is ever touched."""
    candidates = workers(count + 1)
    gone = data.draw(st.integers(0, count))
    pick = sticky()
    before = placed(pick, candidates)
    after = placed(pick, [c for c in candidates if c.handle.slot != gone])

    assert {client for client in KEYS if before[client] != after[client]} == {
        client for client in KEYS if before[client] == gone
    }


def test_sticky_spreads_clients_evenly_enough():
    """256 addresses over 4 slots: a fair hash stays within half of the mean."""
    shares = Counter(placed(sticky(), workers(4)).values())

    assert all(32 < share < 96 for share in shares.values())


def test_of_two_workers_in_one_slot_the_newer_one_is_chosen():
    """The older one is about to leave."""
    old, new = Candidate(Handle(1, 0)), Candidate(Handle(5, 0))

    assert picked(sticky(), [new, old]) == picked(sticky(), [old, new]) == 5


def test_clients_without_an_address_are_spread_by_load():
    """On a unix socket all would be one client otherwise."""
    candidates = workers(2)
    candidates[0].given = 1

    assert picked(sticky(), candidates, client=None) == 2


def test_a_client_without_an_address_does_not_wait_for_a_full_worker():
    """Nothing binds it to anybody."""
    first, second = workers(2)
    first.is_exhausted = True
    second.given = 10

    assert picked(sticky(), [first, second], client=None) == 2


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        (["X-Key: a"], b"a"),
        (["x-kEY:a"], b"a"),
        (["X-Key:\t a b \t"], b"a b"),
        (["X-Key: a", "X-Key: b"], b"a"),
        (["X-Key:", "X-Key: b"], b"b"),
        (["X-Key-Not: a", "Not-X-Key: b"], b""),
        (["Y: X-Key: a"], b""),
        ([], b""),
    ],
)
def test_the_key_is_the_first_value_of_the_header(lines, key):
    """Its name is whole, and in any case."""
    assert Sticky("header", "X-Key")._key_in(head(*lines)) == key


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        (["Cookie: sid=abc"], b"abc"),
        (["COOKIE: a=1; sid=abc; b=2"], b"abc"),
        (["Cookie: a=1;sid=abc=="], b"abc=="),
        (["Cookie: a=1", "Cookie: sid=abc"], b"abc"),
        (["Cookie: xsid=1; sid2=2; Sid=3"], b""),
        (["Cookie: sid"], b""),
        (["Cookie: sid=; sid=x"], b""),
        (["Set-Cookie: sid=abc"], b""),
        (["Cookie: sid=first; sid=second"], b"first"),
    ],
)
def test_the_key_is_the_value_of_the_cookie(lines, key):
    """Names of cookies are compared as they are (RFC 6265, section 5.4), and the first one counts."""
    assert Sticky("cookie", "sid")._key_in(head(*lines)) == key


def test_what_stands_in_the_body_is_no_header():
    """A client that posts a form could otherwise be placed by it."""
    assert Sticky("header", "x-key")._key_in(head() + b"\r\nX-Key: a\r\n") == b""


def test_a_line_that_is_not_whole_is_no_key():
    """The next look would find another, and place the same client elsewhere."""
    pick = Sticky("header", "x-key")
    whole = head("X-Key: abc", "Y: z")
    end = whole.index(b"abc\r\n") + 5

    assert [pick._key_in(whole[:size]) for size in range(end)] == [b""] * end
    assert not any(pick.has_seen_enough(whole[:size]) for size in range(end))
    assert (pick._key_in(whole[:end]), pick.has_seen_enough(whole[:end])) == (b"abc", True)


def test_a_head_without_the_key_is_placed_by_its_address():
    """The first request of a session has no cookie yet. Once the head has ended it is not waited for longer."""
    candidates = workers(8)
    pick = sticky(by="cookie", name="sid")
    by_address = picked(sticky(), candidates)

    assert pick.has_seen_enough(head())
    assert {picked(pick, candidates, head=head()), picked(pick, candidates)} == {by_address}
    assert {picked(pick, candidates, head=head(f"Cookie: sid={sid}")) for sid in range(50)} == set(range(1, 9))


@pytest.mark.parametrize("filling", [b" ", b"\t", b":", b"\r\n", b"\r\nx-key:", b"x-key: \r\n", b"; sid", b"a;"])
def test_no_head_takes_long_to_look_at(filling):
    """The master stands still meanwhile: 16 KiB of anything are read in no time."""
    whole = b"GET / HTTP/1.1\r\nx-key:" + filling * (16384 // len(filling))

    for pick in (Sticky("header", "x-key"), Sticky("cookie", "sid")):
        for _ in range(20):  # a quadratic search would take minutes
            pick.has_seen_enough(whole)


# ---- the user's own ----


def test_the_users_function_sees_the_connection_and_the_workers():
    """And chooses one of them."""
    candidates = workers(3)
    seen = []

    def pick(connection, workers):
        seen.append((connection.client, connection.head, connection.listener, [worker.id for worker in workers]))
        return workers[-1]

    assert picked(make_pick(pick), candidates, head=b"GET") == 3
    assert seen == [(("192.0.2.1", 4711), b"GET", ("0.0.0.0", 80), [1, 2, 3])]


@pytest.mark.parametrize("wrong", [None, 1, "worker", [], Handle(1, 0)])
def test_a_choice_that_was_not_offered_falls_back_and_is_told_once(wrong, caplog):
    """A worker that has no room, or none at all: the connection is served all the same."""
    candidates = workers(2)
    candidates[0].given = 1
    pick = make_pick(lambda connection, workers: wrong)

    assert [picked(pick, candidates) for _ in range(3)] == [2, 2, 2]
    [record] = caplog.records
    assert "which is none of the workers that it was given" in record.getMessage()


def test_a_pick_that_raises_falls_back_and_is_told_once_for_each_kind(caplog):
    """With its traceback the first time."""
    errors = [ValueError("one"), ValueError("two"), KeyError("three")]

    def pick(connection, workers):
        raise errors.pop(0)

    made = make_pick(pick)
    candidates = workers(1)

    assert [picked(made, candidates) for _ in range(3)] == [1, 1, 1]
    assert [type(record.exc_info[1]) for record in caplog.records] == [ValueError, KeyError]


def test_a_function_may_ask_for_the_head():
    """Otherwise nobody waits for it."""

    def pick(connection, workers):
        return workers[0]

    assert not make_pick(pick).needs_head
    pick.needs_head = True

    assert make_pick(pick).needs_head


# ---- how picks are named ----


def test_each_name_makes_its_pick():
    """A pick keeps turns: each listener that wants its own makes its own."""
    made = {name: make_pick(name) for name in ("least_connections", "round_robin", "least_busy", "sticky:ip")}

    assert [type(pick) for pick in made.values()] == [LeastConnections, RoundRobin, LeastBusy, Sticky]
    assert make_pick("round_robin") is not made["round_robin"]
    assert make_pick(made["sticky:ip"]) is made["sticky:ip"]
    header, cookie = make_pick("sticky:header:X-Key"), make_pick("sticky:cookie:sid")
    assert [(pick.by, pick.name, pick.needs_head) for pick in (header, cookie, made["sticky:ip"])] == [
        ("header", "X-Key", True),
        ("cookie", "sid", True),
        ("ip", "", False),
    ]


def test_a_function_is_loaded_by_its_name():
    """As hooks are."""
    pick = make_pick("tests.apps.picks:by_port")

    assert isinstance(pick, Custom)
    assert picked(pick, workers(2), client=("192.0.2.1", 3)) == 2


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("least_conections", "pick is 'least_conections', but must be one of .*, did you mean 'least_connections'?"),
        ("sticky", "did you mean 'sticky:ip'"),
        ("", "pick is '', but must be one of"),
        (None, "pick is None, but must be one of"),
        ("sticky:cooky:sid", "sticky is by 'cooky', but must be by one of ip, header, cookie, did you mean 'cookie'"),
        ("sticky:cookie", "sticky by cookie needs the name of a cookie, such as sticky:cookie:x-session, and has ''"),
        ("sticky:header:a b", "needs the name of a header"),
        ("sticky:ip:x", "sticky by ip has the name 'x', but only headers and cookies have names"),
        ("tests.apps.nothing:f", "pick: no module named 'tests.apps.nothing'|pick: .*tests.apps.nothing"),
        ("tests.apps.picks:nothing", "has no attribute 'nothing'"),
        ("tests.apps.picks:NUMBER", "is of type int, but must be a function of a connection and workers"),
    ],
)
def test_a_pick_that_cannot_be_made_is_a_sentence(spec, sentence):
    """Before the first fork."""
    with pytest.raises(ConfigError, match=sentence):
        make_pick(spec)
