"""What the race makes of its measurements. The measuring itself needs wrk, and peers, and quiet: it is not tested."""

from __future__ import annotations

import pytest

from loadtest.field import FIELD, Order, nginx_configuration
from loadtest.results import BARS, Sample, aligned, bars, parse_wrk, ratio, rows, verdicts
from loadtest.scenarios import SCENARIOS

WRK = """Running 1s test @ http://127.0.0.1:8000/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.10ms  300.12us   9.12ms   90.00%
    Req/Sec    58.03k     1.20k   60.11k    80.00%
  Latency Distribution
     50%    1.05ms
     75%    1.20ms
     90%    1.42ms
     99%    {p99}
  63542 requests in 1.10s, 9.09MB read
{more}Requests/sec:  57765.10
Transfer/sec:      8.26MB
"""


@pytest.mark.parametrize(
    ("text", "seconds"), [("870.00us", 870e-6), ("2.47ms", 2.47e-3), ("1.02s", 1.02), ("1.50m", 90.0)]
)
def test_wrks_percentile_is_told_in_seconds(text, seconds):
    sample = parse_wrk(WRK.format(p99=text, more=""), 0.5)

    assert sample.rate == 57765.10
    assert sample.p99 == pytest.approx(seconds)
    assert sample.note == ""


def test_socket_errors_are_noted_without_those_that_did_not_happen():
    text = WRK.format(p99="1.00ms", more="  Socket errors: connect 0, read 12, write 0, timeout 3\n")

    assert parse_wrk(text, 0.5).note == "read 12, timeout 3"


def test_a_rate_of_refusals_is_no_rate():
    with pytest.raises(ValueError, match="Non-2xx") as caught:
        parse_wrk(WRK.format(p99="1.00ms", more="  Non-2xx or 3xx responses: 17\n"), 0.5)
    assert str(caught.value) == "Non-2xx or 3xx responses: 17"


@pytest.mark.parametrize("text", ["", "unable to connect to 127.0.0.1:1"])
def test_what_is_not_a_result_is_refused(text):
    with pytest.raises(ValueError, match="no result"):
        parse_wrk(text, 0.5)


def samples(*rates):
    return [Sample(rate, 0.002, 0.5) for rate in rates]


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    """Not the ratio of the medians: the third round was a bad one for both."""
    assert ratio(samples(200, 210, 50), samples(100, 100, 20)) == 2.1


def test_rows_are_told_with_the_fastest_first_and_what_to_doubt_is_marked():
    rounds = {
        "uvicorn httptools": samples(100),
        "nginx": [Sample(400, 0.0, 0.99)],
        "node": [Sample(50, 0.01, 0.1, server=0.3)],
    }

    assert rows(rounds, "req/s") == [
        ["server", "req/s", "range", "ratio", "p99 ms", "server busy", "load busy"],
        ["nginx", "400", "400-400", "4.00", "-", "100%", "99% *"],
        ["uvicorn httptools", "100", "100-100", "1.00", "2.00", "100%", "50%"],
        ["node", "50", "50-50", "0.50", "10.00", "30% ?", "10%"],
    ]


def test_without_its_usual_reference_a_field_is_compared_with_its_first():
    table = rows({"prefork ASGI": samples(10), "nginx": samples(30)}, "req/s")

    assert [line[3] for line in table[1:]] == ["3.00", "1.00"]


def test_columns_are_aligned():
    assert list(aligned([["a", "b"], ["long", "1"], ["x", "22"]])) == ["a      b", "long   1", "x     22"]


def test_a_bar_is_reached_at_its_factor_and_missed_below():
    interfaces = {entry.name: entry.interface for entry in FIELD}
    results = {"hello": {"prefork ASGI": samples(140), "granian ASGI": samples(100), "uvicorn httptools": samples(70)}}

    assert [line[1:] for line in verdicts(results, interfaces)[1:]] == [
        ["1.40", "1.40", "reached"],
        ["2.20", "2.00", "MISSED by 9%"],
    ]


def test_ahead_means_of_those_that_are_called_alike():
    interfaces = {entry.name: entry.interface for entry in FIELD}
    names = ("prefork ASGI", "prefork native", "granian ASGI", "granian RSGI", "bjoern", "nginx")
    found = list(bars({"tls": {name: samples(1) for name in names}}, interfaces))

    assert {(bar.ours, bar.theirs) for bar in found} == {
        ("prefork ASGI", "granian ASGI"),
        ("prefork native", "granian RSGI"),
    }


def test_every_bar_names_servers_and_scenarios_that_there_are():
    names = {entry.name for entry in FIELD}

    assert {bar.scenario for bar in BARS} <= {scenario.name for scenario in SCENARIOS}
    assert {name for bar in BARS for name in (bar.ours, bar.theirs)} <= names
    assert {name for scenario in SCENARIOS for name in scenario.only + scenario.without} <= names


@pytest.mark.parametrize("app", ["hello", "large", "file"])
def test_nginx_listens_on_loopback_only_and_keeps_its_files_in_its_room(app, tmp_path):
    text = nginx_configuration(Order(app, 15000, tmp_path), str(tmp_path / "download"))

    assert "listen 127.0.0.1:15000;" in text
    assert text.count("{") == text.count("}")
    assert f"pid {tmp_path}/nginx.pid" in text
