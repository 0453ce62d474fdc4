"""Log lines: their shape, what cannot forge them, and files that are moved away under them."""

from __future__ import annotations

import json
import logging
import os
import re
from select import PIPE_BUF

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork import log
from prefork.errors import ConfigError
from prefork.log import AccessLog, JSONLines, Output, TextLines

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
# 2026-11-21T01:09:59.123Z
MOMENT = 1795223399.123


@pytest.fixture(autouse=True)
def as_it_was():
    """`configure` changes the process's one error log; every test gives it back."""
    logger = logging.getLogger("prefork")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    for handler in [handler for handler in logger.handlers if handler not in before[0]]:
        handler.close()
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
    for access in list(log._access_logs):
        access.close()


def record(message, *args, level=logging.INFO, exc_info=None):
    made = logging.LogRecord("prefork", level, __file__, 1, message, args, exc_info)
    made.created = MOMENT
    return made


def failure():
    try:
        raise ValueError("bad\nnews")
    except ValueError as exc:
        return (ValueError, exc, exc.__traceback__)


# ---- the error log ----


def test_a_line_is_time_level_who_and_what():
    """The shape that everybody's grep relies on."""
    text = TextLines().format(record("worker %d (pid %d, generation %d) exited: killed by SIGKILL", 3, 4242, 2))

    assert text == "2026-11-21T01:09:59.123Z info  worker 3 (pid 4242, generation 2) exited: killed by SIGKILL"


def test_a_traceback_is_indented_below_its_line():
    """Whoever reads by line knows what belongs to what."""
    lines = TextLines().format(record("it failed", level=logging.ERROR, exc_info=failure())).split("\n")

    assert lines[0] == "2026-11-21T01:09:59.123Z error it failed"
    assert lines[1] == "    Traceback (most recent call last):"
    assert lines[-2:] == ["    ValueError: bad", "    news"]


@given(st.text())
def test_no_message_can_forge_a_line_or_reach_the_terminal(message):
    """A peer's header or an application's error ends up here, and must not look like our own line."""
    first, *rest = TextLines().format(record("%s", message)).split("\n")

    assert re.match(f"{TIME} info  ", first)
    assert all(line.startswith("    ") for line in rest)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", "".join([first, *rest]))


@given(st.text())
def test_a_json_line_is_one_line_that_reads_back(message):
    """The message is a value, so it may hold anything."""
    line = JSONLines().format(record("%s", message))

    assert len(line.splitlines()) == 1
    assert json.loads(line) == {
        "time": "2026-11-21T01:09:59.123Z",
        "level": "info",
        "pid": os.getpid(),
        "message": message,
    }


def test_a_json_line_has_the_traceback_as_a_field():
    """A log shipper sends one event, not forty."""
    line = json.loads(JSONLines().format(record("it failed", level=logging.ERROR, exc_info=failure())))

    assert line["message"] == "it failed"
    assert line["traceback"].startswith("Traceback (most recent call last):")
    assert line["traceback"].endswith("ValueError: bad\nnews")


@given(st.floats(0, 4e9))
def test_a_timestamp_never_rounds_up_into_a_second_that_does_not_exist(now):
    """.9996 is still that second: lines of two processes would otherwise change places."""
    stamp = log.timestamp(now)

    assert re.fullmatch(TIME, stamp)
    assert int(stamp[-4:-1]) == int(now * 1000) % 1000


def test_the_error_log_goes_to_the_file_from_its_level_on(tmp_path):
    """What is less serious costs nothing."""
    path = tmp_path / "error.log"
    log.configure("warning", str(path))
    log.logger.info("not this one")
    log.logger.warning("this one")

    assert re.fullmatch(f"{TIME} warning this one\n", path.read_text())


def test_the_error_log_is_standard_error_unless_told_otherwise(capfd):
    """Containers collect it there."""
    log.configure()
    log.logger.info("hello")

    assert re.fullmatch(f"{TIME} info  hello\n", capfd.readouterr().err)


def test_configuring_again_replaces_the_log(tmp_path):
    """`serve` called twice in one process must not write every line twice."""
    log.configure(error_log=str(tmp_path / "first"))
    log.configure(error_log=str(tmp_path / "second"), log_format="json")
    log.logger.info("hello")

    assert (tmp_path / "first").read_text() == ""
    assert json.loads((tmp_path / "second").read_text())["message"] == "hello"


def test_an_unknown_level_is_refused_with_the_nearest():
    """logging would raise a ValueError that names nothing."""
    with pytest.raises(ConfigError, match="log_level is 'warn', .* did you mean 'warning'"):
        log.configure("warn")


def test_a_log_that_cannot_be_opened_names_the_setting_and_the_path(tmp_path):
    """The beginner's mistake is a directory that does not exist."""
    with pytest.raises(ConfigError) as caught:
        log.configure(error_log=str(tmp_path / "no" / "error.log"))

    assert str(caught.value) == f"error_log '{tmp_path}/no/error.log' cannot be opened: no such file or directory"


# ---- files ----


def test_reopen_goes_on_in_a_new_file_after_the_old_one_was_moved(tmp_path):
    """logrotate moves the file and sends USR1."""
    error, access = tmp_path / "error.log", tmp_path / "access.log"
    log.configure(error_log=str(error))
    requests = AccessLog.open(str(access))
    log.logger.info("before")
    error.rename(tmp_path / "error.log.1")
    access.rename(tmp_path / "access.log.1")
    log.logger.info("still the moved file")
    log.reopen()
    log.logger.info("after")
    requests.log(None, "GET", b"/after", "1.1", 200, 5, 0.1, 1)

    assert [line.split("  ")[1] for line in (tmp_path / "error.log.1").read_text().splitlines()] == [
        "before",
        "still the moved file",
    ]
    assert error.read_text().endswith("after\n")
    assert "/after" in access.read_text()
    assert (tmp_path / "access.log.1").read_text() == ""


def test_reopen_keeps_the_old_file_when_the_new_one_cannot_be_opened(tmp_path):
    """A log in the wrong file is better than none; and it says why."""
    folder = tmp_path / "logs"
    folder.mkdir()
    log.configure(error_log=str(folder / "error.log"))
    folder.rename(tmp_path / "moved")
    log.reopen()

    assert (
        "cannot be reopened, the old file is kept: no such file or directory"
        in (tmp_path / "moved" / "error.log").read_text()
    )


def test_a_reopened_file_keeps_its_descriptor_closed_on_exec(tmp_path):
    """A program that the application starts must not inherit the log."""
    output = Output(str(tmp_path / "log"), 2)
    output.reopen()

    assert not os.get_inheritable(output._fd)
    output.close()


def test_the_lines_of_many_processes_land_whole(tmp_path):
    """O_APPEND and one write a line: no lock, no torn lines."""
    path = tmp_path / "access.log"
    access = AccessLog.open(str(path))
    children = []
    for worker in range(4):
        pid = os.fork()
        if pid == 0:
            for number in range(200):
                access.log(("127.0.0.1", 1), "GET", b"/" + b"x" * 300, "1.1", 200, number, 0.001, worker)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    lines = path.read_text().splitlines()

    assert len(lines) == 800
    assert all(
        re.fullmatch(rf'{TIME} 127\.0\.0\.1 "GET /x{{300}} HTTP/1\.1" 200 \d+ 0\.001000 worker \d', line)
        for line in lines
    )


def test_a_full_disk_does_not_stop_the_server():
    """/dev/full refuses every write with ENOSPC."""
    output = Output("/dev/full", 2)
    output.write(b"lost\n")
    output.close()


def test_a_reader_that_left_does_not_stop_the_server():
    """`prefork serve ... 2>&1 | head` closes the pipe; EPIPE follows."""
    reader, writer = os.pipe()
    os.close(reader)
    Output("-", writer).write(b"lost\n")
    os.close(writer)


def test_a_reader_that_stands_still_costs_a_moment_and_the_line_but_not_the_worker():
    """A non-blocking pipe that nobody reads is full after 64 kB."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    Output("-", writer).write(b"x" * 1_000_000)
    os.close(writer)

    assert len(os.read(reader, 2_000_000)) > 0
    os.close(reader)


def test_a_standard_stream_is_not_ours_to_close(tmp_path):
    """Closing descriptor 1 or 2 would hand the number to the next socket."""
    fd = os.open(tmp_path / "stream", os.O_WRONLY | os.O_CREAT)
    output = Output("-", fd)
    output.reopen()
    output.close()
    output.write(b"still open\n")
    os.close(fd)

    assert (tmp_path / "stream").read_bytes() == b"still open\n"


# ---- the access log ----


def test_an_access_line_tells_who_asked_for_what_and_got_what(tmp_path):
    """One line per response, in one shape."""
    access = AccessLog.open(str(tmp_path / "access.log"))
    access.log(("::1", 5123), "GET", b"/path?x=1", "1.1", 200, 5, 0.000412, 3)

    line = (tmp_path / "access.log").read_text()
    assert re.fullmatch(rf'{TIME} ::1 "GET /path\?x=1 HTTP/1\.1" 200 5 0\.000412 worker 3\n', line)


def test_a_client_on_a_unix_socket_is_a_dash(tmp_path):
    """It has no address."""
    access = AccessLog.open(str(tmp_path / "access.log"))
    access.log(None, "GET", b"/", "1.0", 404, 0, 1.5, 1)

    assert ' - "GET / HTTP/1.0" 404 0 1.500000 worker 1\n' in (tmp_path / "access.log").read_text()


@given(method=st.text(), target=st.binary())
def test_no_request_can_forge_an_access_line(method, target):
    """What stands between the quotes reads back exactly, and no quote or line end gets through."""
    (line,) = log._access_text("T", [(("c", 1), method, target, "1.1", 200, 0, 0.0, 1)])
    quoted = re.fullmatch(r'T c "((?:[ !#-\[\]-~]|\\.)*) HTTP/1\.1" 200 0 0\.000000 worker 1\n', line)

    assert quoted
    if method.isascii():
        plain = re.sub(r'\\(x(..)|["\\])', lambda m: chr(int(m[2], 16)) if m[2] else m[1], quoted[1])
        assert plain == f"{method} {target.decode('latin-1')}"


@given(method=st.text(), target=st.binary())
def test_an_access_line_of_json_reads_back(method, target):
    """For machines: the same facts, by name."""
    (line,) = log._access_json("T", [(("127.0.0.1", 1), method, target, "1.1", 200, 5, 0.0004124, 3)])

    assert len(line.splitlines()) == 1
    assert json.loads(line) == {
        "time": "T",
        "client": "127.0.0.1",
        "method": method,
        "target": target.decode("latin-1"),
        "version": "1.1",
        "status": 200,
        "size": 5,
        "seconds": 0.000412,
        "worker": 3,
    }


def test_the_access_log_may_be_off_or_standard_output(capfd):
    """Off is None, so that the hot path asks once and formats nothing."""
    AccessLog.open("-").log(None, "GET", b"/", "1.1", 204, 0, 0.1, 2)

    assert AccessLog.open("off") is None
    assert capfd.readouterr().out.endswith("worker 2\n")


def test_an_access_log_that_cannot_be_opened_names_the_setting(tmp_path):
    """Two logs, two settings: the message says which."""
    with pytest.raises(ConfigError, match="access_log '.*' cannot be opened: is a directory"):
        AccessLog.open(str(tmp_path))


def test_deferred_lines_leave_together_in_pieces_that_a_pipe_keeps_whole(tmp_path):
    """A system call per line would cost more than the rest of it; workers share the pipe, so it must not tear lines."""
    path, later = tmp_path / "access.log", []
    log = AccessLog.open(str(path))
    log.defer = later.append
    for _ in range(100):
        log.log(("192.0.2.1", 1), "GET", b"/" + b"x" * 50, "1.1", 200, 3, 0.001, 1)
    assert later == [log.flush]
    assert path.read_bytes() == b""

    written, write = [], log.output.write
    log.output.write = lambda lines: (written.append(lines), write(lines))
    later.pop()()
    assert 1 < len(written) < 10
    assert all(lines.endswith(b"\n") and len(lines) <= PIPE_BUF for lines in written)
    assert path.read_bytes().count(b"\n") == 100
    log.close()
