"""What RFC 9110 demands of validators and conditions, where no other test shows it. docs/http.md lists all of it."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime

import pytest

from prefork.gateway.file import Selection, select
from prefork.gateway.message import Headers

MTIME = 1_000_000_000_500_000_000  # nanoseconds
MODIFIED = "Sun, 09 Sep 2001 01:46:40 GMT"
LATER = "Sun, 09 Sep 2001 01:46:41 GMT"
EARLIER = "Sun, 09 Sep 2001 01:46:39 GMT"


def selection(method="GET", own=None, mtime=MTIME, **request) -> Selection:
    headers = {name.replace("_", "-"): value for name, value in request.items()}
    return select(method, Headers(headers), Headers(own), 10, mtime)


def test_last_modified_is_never_later_than_now():
    """Section 8.8.2.1: a file may come from the future, its date may not."""
    headers = dict(selection(mtime=time.time_ns() + 10**13).headers)

    assert parsedate_to_datetime(headers["last-modified"]).timestamp() <= time.time()


@pytest.mark.parametrize(
    ("own", "request_headers", "status"),
    [
        ({}, {"if_match": '"other"'}, 412),
        ({"ETag": '"a"'}, {"if_match": '"a"'}, 200),
        ({"ETag": '"a"'}, {"if_match": '"b", "a"'}, 200),
        ({"ETag": 'W/"a"'}, {"if_match": 'W/"a"'}, 412),
        ({}, {"if_match": "*"}, 200),
        ({}, {"if_unmodified_since": EARLIER}, 412),
        ({}, {"if_unmodified_since": MODIFIED}, 200),
        ({}, {"if_unmodified_since": "not a date"}, 200),
        ({"ETag": '"a"'}, {"if_match": '"a"', "if_unmodified_since": EARLIER}, 200),
        ({"ETag": '"a"'}, {"if_match": '"a"', "if_none_match": '"a"'}, 304),
        ({"ETag": '"a"'}, {"if_match": '"b"', "if_none_match": '"a"'}, 412),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_preconditions_are_weighed_in_their_order(method, own, request_headers, status):
    """Section 13.2.2: If-Match, else If-Unmodified-Since; then If-None-Match, else If-Modified-Since."""
    assert selection(method, own, **request_headers).status == status


@pytest.mark.parametrize(
    "date", ["Sun, 09 Sep 2001 01:46:40 GMT", "Sunday, 09-Sep-01 01:46:40 GMT", "Sun Sep  9 01:46:40 2001"]
)
def test_dates_are_read_in_all_three_forms(date):
    """Section 5.6.7: the two obsolete ones too."""
    assert selection(if_modified_since=date).status == 304


def test_date_of_this_second_is_too_weak_for_if_range():
    """Sections 13.1.5 and 8.8.2.2: the file may change once more within the second."""
    now = time.time_ns()
    modified = dict(selection(mtime=now).headers)["last-modified"]

    assert selection(mtime=now, range="bytes=0-3", if_range=modified).status == 200
