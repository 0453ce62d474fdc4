"""`prefork.serve()` called from programs: from wherever they are started, and back to where they were.

Every program here ends itself: its listener of "listening" sends TERM to the master
that it runs in, so serve() returns as soon as the server is up.
"""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest

import prefork
from prefork.config import SETTINGS
from prefork.control import serve as serving
from prefork.errors import ConfigError, PreforkError, StartError
from tests.harness.client import get
from tests.harness.server import Server

PYTHON = sys.executable

# A module that serves itself when it is the main program; it stays up until it is told to stop.
SELF = """\
import prefork


async def app(request):
    return f"hello from {__name__}"


if __name__ == "__main__":
    prefork.serve(%s, bind="127.0.0.1:0", workers=2)
    print("serve() has returned", flush=True)
"""

# What programs that end themselves begin with.
STOPS = """\
import os, signal, sys
import prefork
from prefork import cluster


async def app(request):
    return "hello"


@cluster.on("listening")
def stop(worker, address):
    print("listening", address, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """Those of the machine that runs the tests are no setting of the programs."""
    for setting in SETTINGS.values():
        monkeypatch.delenv(setting.variable, raising=False)


@pytest.fixture
def runs(tmp_path):
    """Run a program, which ends by itself: (exit code, what it printed)."""

    def runs(program: str, *, before: str = STOPS) -> tuple[int, str]:
        (tmp_path / "program.py").write_text(before + program)
        with Server(None, command=[PYTHON, "program.py"], cwd=tmp_path) as server:
            return server.wait_exit(), server.log

    return runs


# ---- from wherever it is started ----


@pytest.mark.parametrize("app", ["app", "'package.module:app'"])
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["-m", "package.module"], id="python -m"),
        pytest.param(["package/module.py"], id="python file"),
        pytest.param(["-c", "import runpy; runpy.run_module('package.module', run_name='__main__')"], id="run_module"),
        pytest.param(["-c", "import runpy; runpy.run_path('package/module.py', run_name='__main__')"], id="run_path"),
        pytest.param(["-m", "cProfile", "-m", "package.module"], id="another tool"),
    ],
)
def test_it_serves_however_its_module_was_started(tmp_path, command, app):
    """The application object comes with the fork; the one that is named is imported by each worker."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "module.py").write_text(SELF % app)
    with Server(None, command=[PYTHON, *command], cwd=tmp_path) as server:
        server.wait_ready(2)
        answer = get(server.port)
        server.signal(signal.SIGTERM)
        code = server.wait_exit()

    assert answer.text == ("hello from __main__" if app == "app" else "hello from package.module")
    assert code == 0
    assert server.log.count("serve() has returned") == 1  # once: a worker never comes back from it


def test_it_serves_inside_a_test_of_pytest(tmp_path):
    """With its captured streams and its hooks into imports; the workers leave nothing in the report."""
    program = STOPS + "def test_server():\n    prefork.serve(app, bind='127.0.0.1:0', workers=2)\n"
    (tmp_path / "test_program.py").write_text(program)
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "test_program.py"]
    with Server(None, command=command, cwd=tmp_path) as server:
        code = server.wait_exit()

    assert code == 0
    assert server.log.count("1 passed") == 1


def test_it_serves_under_a_parent_that_waits_for_it(tmp_path):
    """A tool that runs the program, reads its output through a pipe and asks it to stop."""
    (tmp_path / "app.py").write_text(SELF % "app")
    parent = (
        "import re, signal, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, 'app.py'], stderr=subprocess.PIPE, text=True)\n"
        "while 'is listening' not in child.stderr.readline():\n"
        "    pass\n"
        "child.send_signal(signal.SIGINT)\n"
        "child.stderr.read()\n"
        "print('child ended with', child.wait())\n"
    )
    with Server(None, command=[PYTHON, "-c", parent], cwd=tmp_path) as server:
        server.wait_exit()

    assert "child ended with 0" in server.log


# ---- settings and listeners ----


@pytest.mark.parametrize("setting", [each for each in SETTINGS.values() if each.name != "app"], ids=lambda s: s.name)
def test_every_setting_is_a_keyword(monkeypatch, tmp_path, setting):
    """Under the name of its field, with the value that Python has for it."""
    (tmp_path / "settings.toml").touch()
    values = {
        "bind": "unix:/x",
        "workers": 3,
        "root_path": "/api",
        "preload": True,
        "pythonpath": ["lib"],
        "env": {"A": "1"},
        "hooks": "a:b",
        "unix_mode": "660",
        "config": str(tmp_path / "settings.toml"),
        "proxy_protocol": True,
        "accept_gate": False,
        "pick": "round_robin",
    }
    value = values.get(setting.name, setting.kind.words[-1] if setting.kind.words else "777")
    more = {"certfile": "c.pem"} if setting.group == "TLS" and setting.name != "certfile" else {}
    if setting.name == "pick":
        more["sharing"] = "handoff"
    if setting.name == "client_cert":
        more["client_ca"] = "ca.pem"
    given = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serving, "serve_command", lambda settings: given.append(settings) or 0)

    prefork.serve(print, **{setting.name: value}, **more)

    assert given[0].app is print
    assert getattr(given[0], setting.name) == setting.kind.read(value) != setting.default


def test_every_setting_at_once_takes_effect(tmp_path, runs):
    """A real server with all of them, as far as they can be seen from the application."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl program is not installed, and makes the certificate")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-passout", "pass:secret")
    names = ("-subj", "/CN=localhost", "-keyout", "k.pem", "-out", "c.pem")
    subprocess.run(
        ["openssl", "req", "-x509", *curve, "-days", "2", *names], cwd=tmp_path, check=True, capture_output=True
    )
    for folder in ("there", "lib"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lib" / "library.py").write_text("def hooks(cluster): print('hooks', cluster.is_master, flush=True)\n")
    (tmp_path / "s.toml").write_text("workers = 7\n")
    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    values = {
        "bind": ["127.0.0.1:0", "unix:s.sock"],
        "workers": 2,
        "sharing": "handoff",
        "pick": "least_busy",
        "accept_gate": False,
        "interface": "native",
        "threads": 2,
        "loop": "asyncio",
        "backlog": 16,
        "root_path": "/api",
        "lifespan": "off",
        "preload": True,
        "chdir": "there",
        "pythonpath": [str(tmp_path / "lib")],
        "env": {"GREETING": "hello"},
        "hooks": "library:hooks",
        "user": user,
        "group": group,
        "unix_mode": "600",
        "unix_owner": f"{user}:{group}",
        "pidfile": "pid",
        "config": "s.toml",
        "graceful_timeout": 5,
        "boot_timeout": 15,
        "head_timeout": 5,
        "body_timeout": 5,
        "keep_alive_timeout": 5,
        "write_timeout": 5,
        "limit_head": "16k",
        "limit_fields": 50,
        "limit_target": 4096,
        "limit_body": "1m",
        "ws_max_size": "1m",
        "ws_ping_interval": 5,
        "ws_ping_timeout": 5,
        "ws_compression": False,
        "forwarded_allow_ips": "10.0.0.0/8",
        "forwarded_headers": "forwarded",
        "proxy_protocol": True,
        "proxy_allow_ips": "10.0.0.0/8",
        "certfile": "c.pem",
        "keyfile": "k.pem",
        "keyfile_password": "secret",
        "client_ca": "c.pem",
        "client_cert": "optional",
        "log_level": "debug",
        "error_log": "error.log",
        "access_log": "access.log",
        "log_format": "json",
        "server_header": "off",
    }
    assert {*values, "app"} == {*SETTINGS}
    code, text = runs(
        f"""
@cluster.on("listening")
def look(worker, address):
    print(len(cluster.workers), os.getcwd(), os.environ["GREETING"], oct(os.stat("../s.sock").st_mode), flush=True)

prefork.serve(app, **{values!r})
print(os.getcwd(), "GREETING" in os.environ, os.listdir())
"""
    )

    assert code == 0, text
    assert "hooks True" in text
    assert f"2 {tmp_path}/there hello 0o140600" in text
    assert re.search(rf"^{tmp_path} False \[", text, re.MULTILINE)
    assert not (tmp_path / "pid").exists()
    assert not (tmp_path / "s.sock").exists()
    assert '"message": "listening on https://127.0.0.1:' in (tmp_path / "error.log").read_text()


def test_listeners_that_were_registered_before_hear_every_step(runs):
    """In the master, in order, and those that were removed hear nothing."""
    code, text = runs(
        """
cluster.on("fork", lambda worker: print("fork", worker.id, worker.pid in (w.pid for w in cluster.workers.values())))
cluster.on("online", lambda worker: print("online", worker.id))
cluster.on("exit", lambda worker, code, signal: print("exit", worker.id, code, signal, worker.exit_cause))
removed = cluster.on("fork", lambda worker: print("never"))
cluster.off("fork", removed)
prefork.serve(app, bind="127.0.0.1:0", workers=1)
"""
    )

    steps = [line for line in text.splitlines() if re.match(r"fork|online|listening|exit|never", line)]
    assert code == 0
    assert [step.split(":")[0] for step in steps] == [
        "fork 1 True",
        "online 1",
        "listening 127.0.0.1",
        "exit 1 0 None retired",
    ]


# ---- refusals ----


def test_it_refuses_inside_a_running_event_loop():
    """Every fork would copy the loop, with its epoll set."""

    async def main():
        prefork.serve(print)

    with pytest.raises(StartError) as caught:
        asyncio.run(main())
    assert str(caught.value) == (
        "serve() was called inside a running event loop, which every fork would copy: "
        "call it from plain code, not from a coroutine"
    )


def test_it_refuses_in_a_thread():
    """Python delivers signals to the main thread alone."""
    told = []

    def run():
        try:
            prefork.serve(print)
        except StartError as error:
            told.append(str(error))

    thread = threading.Thread(target=run, name="background")
    thread.start()
    thread.join()
    assert told == ["serve() was called in thread 'background', but only the main thread gets signals: call it there"]


@pytest.mark.parametrize("kind", ["async def", "def"])
def test_it_refuses_in_a_worker(tmp_path, kind):
    """In a coroutine as in a thread of the worker: that it is a worker says more than that."""
    (tmp_path / "app.py").write_text(
        f"import prefork\n\n\n{kind} app(request):\n    try:\n        prefork.serve(app)\n"
        "    except prefork.PreforkError as error:\n        return str(error)\n"
    )
    with Server("app:app", cwd=tmp_path, workers=1) as server:
        server.wait_ready(1)
        told = get(server.port).text

    assert told == "serve() was called in a worker: put it under `if __name__ == '__main__':`"


def test_it_refuses_while_it_serves(runs):
    """A listener that starts a second server: the first would never hear a signal again."""
    code, text = runs(
        """
@cluster.on("fork")
def again(worker):
    try:
        prefork.serve(app, bind="127.0.0.1:0")
    except prefork.PreforkError as error:
        print("refused:", error, flush=True)

prefork.serve(app, bind="127.0.0.1:0", workers=1)
"""
    )

    assert code == 0
    assert "refused: serve() was called while this process serves already: call it again after it has returned" in text


@pytest.mark.parametrize(
    ("app", "settings", "sentence"),
    [
        (print, {"worker": 2}, "there is no setting 'worker', did you mean 'workers'?"),
        (print, {"workers": 0}, "workers is 0, but must be a whole number from 1 to 1024 or auto"),
        (None, {}, "no application was named: it is module:attribute, such as 'app:handler'"),
        (
            42,
            {},
            "app is 42, but must be module:attribute, such as 'app:handler', or the application itself",
        ),
    ],
)
def test_what_is_wrong_is_raised_before_anything_is_done(tmp_path, monkeypatch, app, settings, sentence):
    """For the program to catch, as what it is: an error of its call."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        prefork.serve(app, **settings)
    assert str(caught.value) == sentence


def test_an_address_in_use_is_raised(runs):
    """And the program may try another one: nothing of the first attempt is left."""
    code, text = runs(
        """
import socket
taken = socket.create_server(("127.0.0.1", 0))
try:
    prefork.serve(app, bind=f"127.0.0.1:{taken.getsockname()[1]}", workers=1)
except OSError as error:
    print("caught", isinstance(error, prefork.PreforkError), error.errno, flush=True)
prefork.serve(app, bind="127.0.0.1:0", workers=1)
print("served")
"""
    )

    assert code == 0
    assert "caught True 98" in text
    assert text.endswith("served\n")


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize(
    ("app", "code"),
    [("'no_such_module:app'", 4), ("refuses", 3)],
)
def test_an_application_that_cannot_boot_ends_the_program_with_the_exit_code(runs, app, code, preload):
    """SystemExit, so that a program that does not care ends as `prefork serve` would."""
    ended, text = runs(
        f"""
async def refuses(scope, receive, send):
    await receive()
    await send({{"type": "lifespan.startup.failed", "message": "the cache is cold"}})

try:
    prefork.serve({app}, bind="127.0.0.1:0", workers=2, preload={preload})
finally:
    print("finally", sys.exc_info()[1].code, flush=True)
print("never")
"""
    )

    assert ended == code
    assert text.count(f"finally {code}") == 1
    assert "never" not in text


# ---- and back ----

STATE = """
import asyncio, gc, random, socket, threading

def state():
    return {
        "handlers": {n: signal.getsignal(n) for n in signal.valid_signals() if n not in (9, 19)},
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "collector": (gc.isenabled(), gc.get_freeze_count() > 0, gc.get_threshold(), gc.get_debug()),
        "threads": threading.enumerate(),
        "directory": os.getcwd(),
        "variables": dict(os.environ),
        "path": list(sys.path),
        "workers": dict(cluster.workers),
        "is_master": cluster.is_master,
    }

def wakeup():
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    return descriptor

def descriptors():
    return {int(name) for name in os.listdir("/proc/self/fd")} - {max(map(int, os.listdir("/proc/self/fd")))}

def compare(before):
    after = state()
    print("changed:", [key for key in before if before[key] != after[key]], flush=True)

os.mkdir("there")
SETTINGS = dict(bind=["127.0.0.1:0", "unix:s.sock"], workers=2, chdir="there", env={"NEW": "1", "HOME": "/other"},
                pythonpath=["lib"], access_log="access.log", error_log="error.log", pidfile="pid")
"""


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("handler", ["lambda *_: None", "signal.SIG_IGN", "signal.SIG_DFL"])
def test_the_program_gets_its_process_back_as_it_was(runs, tmp_path, handler, is_frozen):
    """Handlers, mask, wake-up descriptor, collector, threads, directory, variables and import path."""
    code, text = runs(
        STATE
        + f"""
for number in "INT TERM QUIT HUP USR1 USR2 TTIN TTOU CHLD WINCH".split():
    signal.signal(getattr(signal, "SIG" + number), {handler})
if {is_frozen}:
    gc.freeze()
ours, theirs = socket.socketpair()
theirs.setblocking(False)
signal.set_wakeup_fd(theirs.fileno())
gc.disable()
before = state()
prefork.serve(app, **SETTINGS)
print("wake-up", wakeup() == theirs.fileno())
compare(before)
"""
    )

    assert code == 0, text
    assert "wake-up True" in text
    assert "changed: []" in text
    assert not (tmp_path / "s.sock").exists()
    assert not (tmp_path / "pid").exists()


def test_two_servers_one_after_another(runs):
    """The second is as good as the first, and each gives back every descriptor."""
    code, text = runs(
        STATE
        + """
before, opened = state(), []
for _ in range(3):
    prefork.serve(app, **SETTINGS)
    opened.append(descriptors())
    compare(before)
print("leaked", opened[1] ^ opened[0], opened[2] ^ opened[0])
asyncio.run(asyncio.sleep(0))  # the program goes on as it likes
"""
    )

    assert code == 0, text
    assert text.count("changed: []") == 3
    assert text.count("listening 127.0.0.1:") >= 3
    assert "leaked set() set()" in text


def test_a_server_can_follow_one_that_could_not_boot(runs):
    """The failure belongs to the first alone."""
    code, text = runs(
        """
try:
    prefork.serve("no_such_module:app", bind="127.0.0.1:0", workers=2)
except SystemExit as ended:
    print("first", ended.code, flush=True)
prefork.serve(app, bind="127.0.0.1:0", workers=2)
print("second")
"""
    )

    assert code == 0
    assert text.index("first 4") < text.index("listening 127.0.0.1:") < text.index("second")


def test_everything_it_raises_has_one_root():
    """`except prefork.PreforkError` is enough."""
    assert issubclass(StartError, PreforkError)
    assert issubclass(ConfigError, prefork.PreforkError)
