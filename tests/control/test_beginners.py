"""Every failure that a beginner meets, tried with the real command line: its sentence, its exit code, nothing left.

What is wrong before the first fork is one line on stderr, `prefork: ...`. What only a
worker can find out is one error in the log, with the application's own traceback if it
was the application that failed. An application that hangs at import, or does not start
under an ASGI lifespan, is in tests/cluster/test_lifecycle.py.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import prefork
from prefork.config import SETTINGS
from tests.harness.server import Server

HELLO = "async def app(request):\n    return 'hello'\n\n\nnumber = 3\n"
FREE = "127.0.0.1:0"
PACKAGE = Path(prefork.__file__).parent

STARTING = re.compile(r"^\S+ info  (prefork .+ \(pid \d+\) starts|listening on) .*$")

# The unprivileged user, called nobody nearly everywhere. Privileges are dropped in the process itself,
# after its imports, since that user may not be allowed to read the interpreter (pyenv in /root).
NOBODY = 65534
AS_NOBODY = (
    "import encodings.idna, importlib.metadata, os\n"
    "from prefork.control import cli\n"
    "importlib.metadata.version('prefork')\n"
    f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    "cli.main()\n"
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become the user nobody")


@dataclass(frozen=True)
class Failure:
    """What a command line that failed has said."""

    code: int
    text: str

    @property
    def sentence(self) -> str:
        """The one line of a start that went no further, without `prefork: `; nothing else may have been printed."""
        lines = [line for line in self.text.splitlines() if not STARTING.match(line)]
        assert len(lines) == 1, self.text
        assert lines[0].startswith("prefork: "), self.text
        return lines[0].removeprefix("prefork: ")

    @property
    def boot_failure(self) -> str:
        """Why a worker could not boot: told once, and followed by nothing but the application's traceback."""
        lines = [line for line in self.text.splitlines() if not STARTING.match(line) and not line.startswith("    ")]
        assert len(lines) == 2, self.text
        assert lines[1].endswith("giving up: no worker has ever booted, so the next one would fail the same way")
        told = re.fullmatch(r"\S+ error worker [12] \(pid \d+, generation 1\) cannot boot: (.*)", lines[0])
        assert told, self.text
        return told[1]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """Those of the machine that runs the tests are not the beginner's."""
    for setting in SETTINGS.values():
        monkeypatch.delenv(setting.variable, raising=False)


@pytest.fixture
def place(tmp_path):
    """A folder with an application in it, as a beginner has one."""
    (tmp_path / "app.py").write_text(HELLO)
    return tmp_path


@pytest.fixture
def fails(place):
    """Run `prefork serve` with flags until it has failed, and prove that it left no process and no file."""

    def fails(*arguments: object, as_nobody: bool = False, cwd: Path = place, **variables: str) -> Failure:
        start = ["-c", AS_NOBODY] if as_nobody else ["-m", "prefork"]
        before = files(place), files(cwd)
        command = [sys.executable, *start, "serve", *map(str, arguments)]
        with Server(None, command=command, cwd=cwd, environ=variables) as server:
            code = server.wait_exit()
        assert f'File "{PACKAGE}/' not in server.log, server.log  # no traceback of ours
        assert (files(place), files(cwd)) == before
        return Failure(code, server.log)

    return fails


def files(folder):
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


# ---- the application ----


@pytest.mark.parametrize("preload", [[], ["--preload"]])
def test_no_such_module_says_where_it_was_looked_for_and_what_is_there(fails, place, preload):
    """The usual cause is the wrong folder, so the sentence names the one that is current."""
    failure = fails("ap:app", "--bind", FREE, "--workers", 2, *preload)

    assert failure.code == 4
    sentence = failure.text.splitlines()[-1] if preload else failure.boot_failure
    assert sentence.endswith(
        f"no module 'ap' (for 'ap:app'): it is looked for in the current directory ({place}; --chdir changes it), "
        f"in --pythonpath and among the packages of {sys.prefix}; did you mean 'app'?"
    )


def test_started_inside_a_folder_without_the_application(fails, place):
    """The same sentence, with the folder that one has forgotten to leave."""
    (place / "docs").mkdir()
    failure = fails("app:app", "--bind", FREE, cwd=place / "docs")

    assert failure.code == 4
    assert f"looked for in the current directory ({place}/docs; --chdir changes it)" in failure.boot_failure


@pytest.mark.parametrize(
    ("target", "module", "sentence"),
    [
        ("app:ap", "", "module 'app' ({place}/app.py) has no attribute 'ap' (for 'app:ap'); did you mean 'app'?"),
        (
            "site",
            "",
            (
                "module 'site' ({site}) has none of 'app', 'application', 'handler': name the application, "
                "as in 'site:name'; it has"
            ),
        ),
        ("app:number", "", "'app:number' is of type int, a callable was expected"),
        (
            "app.py:app",
            "",
            "'app.py:app' names a file, expected 'module:attribute', 'module:factory()' or 'module': write 'app:app'",
        ),
        (
            "./src/app.py:app",
            "",
            (
                "'./src/app.py:app' names a file, expected 'module:attribute', 'module:factory()' or 'module': "
                "write 'src.app:app'"
            ),
        ),
        (
            "mine:make",
            "def make():\n    return print\n",
            (
                "'mine:make' takes no arguments, an application takes a request, or ASGI's or WSGI's: "
                "if it makes the application, write 'mine:make()'"
            ),
        ),
        (
            "mine:make()",
            "async def make():\n    return print\n",
            "factory 'mine:make()' is async; it is called before there is an event loop, so it must not be",
        ),
    ],
)
def test_an_application_that_cannot_be_named_so(fails, place, target, module, sentence):
    """Found out by a worker; code 4, as with gunicorn."""
    (place / "mine.py").write_text(module)
    failure = fails(target, "--bind", FREE, "--workers", 2)

    assert failure.code == 4
    assert failure.boot_failure.startswith(sentence.format(place=place, site=sys.modules["site"].__file__))


@pytest.mark.parametrize(
    ("module", "sentence", "last_line"),
    [
        (
            "import no_such_library\n",
            "module 'mine' was found, but importing it failed: ModuleNotFoundError: No module named 'no_such_library'",
            "ModuleNotFoundError: No module named 'no_such_library'",
        ),
        (
            "def app(:\n",
            "module 'mine' was found, but importing it failed: SyntaxError: invalid syntax",
            "SyntaxError: invalid syntax",
        ),
        (
            "import sys\nsys.exit('no configuration')\n",
            "module 'mine' was found, but importing it failed: SystemExit: no configuration",
            "SystemExit: no configuration",
        ),
        (
            "import sys\nsys.exit(0)\n",
            "module 'mine' was found, but importing it failed: SystemExit: 0",
            "SystemExit: 0",
        ),
    ],
)
def test_an_application_that_fails_to_import(fails, place, module, sentence, last_line):
    """Its own traceback, once, from its own file on."""
    (place / "mine.py").write_text(module)
    failure = fails("mine:app", "--bind", FREE, "--workers", 2)

    assert failure.code == 4
    assert failure.boot_failure == sentence
    assert failure.text.count(f'File "{place}/mine.py"') == 1
    assert failure.text.count(f"    {last_line}\n") == 1


@pytest.mark.parametrize("preload", [[], ["--preload"]])
def test_a_factory_that_fails(fails, place, preload):
    """Most often it misses a variable."""
    (place / "mine.py").write_text("import os\n\n\ndef make():\n    return os.environ['NO_SUCH_VARIABLE']\n")
    failure = fails("mine:make()", "--bind", FREE, *preload)

    assert failure.code == 4
    assert failure.text.count("factory 'mine:make()' failed: KeyError: 'NO_SUCH_VARIABLE'") == 1
    assert failure.text.count("Traceback (most recent call last)") == 1
    assert f'File "{place}/mine.py", line 5, in make' in failure.text


def test_an_application_that_ends_the_process_while_it_is_imported(fails, place):
    """os._exit, or a crash in C: nobody is left to say why, but it is said when."""
    (place / "mine.py").write_text("import os\nos._exit(0)\n")
    failure = fails("mine:app", "--bind", FREE, "--workers", 1)

    assert failure.code == 3
    assert re.search(r"worker 1 \(.*\) ended before it listened: exited with code 0 \(crashed\)", failure.text)


def test_serve_without_a_main_guard(fails, place):
    """The module that calls serve() is imported again, by a worker."""
    (place / "mine.py").write_text("import prefork\n\nasync def app(request): ...\n\nprefork.serve(app)\n")
    with Server("mine:app", cwd=place) as server:
        code = server.wait_exit()

    assert code == 4
    assert "serve() was called in a worker: put it under `if __name__ == '__main__':`" in server.log
    assert server.log.count(f'File "{place}/mine.py", line 5') == 1


def test_a_boot_failure_is_not_silent_where_the_log_is_a_file(place):
    """Otherwise the terminal would show nothing, and 4 means nothing to a beginner."""
    with Server("app:nothing", cwd=place, error_log=place / "error.log") as server:
        code = server.wait_exit()

    assert (code, server.log) == (4, f"prefork: could not start; {place}/error.log says why\n")
    assert "has no attribute 'nothing'" in (place / "error.log").read_text()


# ---- addresses ----


@pytest.mark.parametrize("sharing", ["inherit", "reuseport", "handoff"])
def test_a_port_that_a_stranger_has(fails, sharing):
    """Also one who would share it: a second server must not steal half of the requests."""
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        failure = fails("app:app", "--bind", f"127.0.0.1:{port}", "--sharing", sharing)

    assert failure.code == 1
    assert failure.sentence == (
        f"cannot listen on 127.0.0.1:{port}: it is in use, another process listens there "
        f"(to see which: ss -ltnp 'sport = :{port}'); choose another with --bind"
    )


@pytest.mark.parametrize("sharing", ["inherit", "reuseport"])
def test_a_port_that_another_prefork_has(fails, place, sharing):
    """Forgotten in another terminal; it goes on undisturbed. What was bound before is taken back."""
    with Server("app:app", cwd=place, workers=1, sharing=sharing) as first:
        first.wait_ready(1)
        address = f"127.0.0.1:{first.port}"
        failure = fails("app:app", "--bind", "unix:other.sock", "--bind", address, "--sharing", sharing)

        assert failure.code == 1
        assert failure.sentence.startswith(f"cannot listen on {address}: it is in use, another process listens there")
        assert first.process.poll() is None


def test_a_unix_socket_that_another_prefork_has(fails, place):
    """It is not taken away from it."""
    with Server("app:app", cwd=place, workers=1, bind="unix:app.sock") as first:
        first.wait_ready(1)
        failure = fails("app:app", "--bind", "unix:app.sock")

        assert failure.code == 1
        assert failure.sentence.startswith(
            "cannot listen on unix:app.sock: it is in use, a process listens there (the path belongs to user "
        )
        assert (place / "app.sock").is_socket()


@needs_root
def test_a_privileged_port_as_an_ordinary_user(fails):
    """The sentence has both ways out: a higher port, or the right to this one."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest <= 80:
        pytest.skip(f"this machine gives every user the ports from {lowest} up")
    failure = fails("app:app", "--bind", "127.0.0.1:80", as_nobody=True)

    assert failure.code == 1
    assert failure.sentence.startswith(
        f"cannot listen on 127.0.0.1:80: port 80 is privileged for user {NOBODY}; choose one from {lowest} up, "
        f"or allow it with: setcap cap_net_bind_service=+ep /"
    )


@pytest.mark.parametrize(
    ("bind", "sentence"),
    [
        # RFC 5737: an address for documentation, which no machine has.
        ("192.0.2.1:8000", "cannot listen on 192.0.2.1:8000: no interface of this machine has the address 192.0.2.1"),
        ("unix:{place}/no/s.sock", "cannot listen on unix:{place}/no/s.sock: the directory {place}/no does not exist"),
        ("unix:{place}/app.py", "cannot listen on unix:{place}/app.py: the path exists and is not a socket"),
        (
            "unix:/tmp/" + "x" * 110,
            "cannot listen on unix:/tmp/" + "x" * 110 + ": the path has 115 bytes, a unix socket's at most 107",
        ),
        ("fd://77", "cannot listen on fd://77: the descriptor is not open"),
    ],
)
def test_an_address_that_cannot_be_had_here(fails, place, bind, sentence):
    """The machine refuses: code 1."""
    failure = fails("app:app", "--bind", bind.format(place=place))

    assert (failure.code, failure.sentence) == (1, sentence.format(place=place))


@pytest.mark.parametrize(
    ("binds", "sentence"),
    [
        (
            ["localhost"],
            (
                "'localhost' is not an address to bind: it has no port; "
                "write host:port, [ipv6]:port, :port, unix:/path, unix:@name or fd://number"
            ),
        ),
        (
            ["http://127.0.0.1:8000"],
            (
                "'http://127.0.0.1:8000' is not an address to bind: http:// is not known here; "
                "write host:port, [ipv6]:port, :port, unix:/path, unix:@name or fd://number"
            ),
        ),
        (
            ["127.0.0.1:80000"],
            "'127.0.0.1:80000' is not an address to bind: port 80000 is out of range: 0 to 65535 are allowed",
        ),
        (["unix:a", "unix:a"], "bind names 'unix:a' twice"),
    ],
)
def test_an_address_that_is_none(fails, binds, sentence):
    """The setting is wrong on every machine: code 2."""
    failure = fails("app:app", *(word for bind in binds for word in ("--bind", bind)))

    assert (failure.code, failure.sentence) == (2, sentence)


def test_two_addresses_that_overlap(fails):
    """Nobody else has the port but we ourselves."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    failure = fails("app:app", "--bind", f"127.0.0.1:{port}", "--bind", f"0.0.0.0:{port}")

    assert failure.code == 2
    assert failure.sentence == f"bind names 0.0.0.0:{port} and 127.0.0.1:{port}, which overlap: one of them is enough"


# ---- settings ----


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        (["--workers", 0], {}, "--workers is '0', but must be a whole number from 1 to 1024 or auto"),
        (
            ["--loop", "uvlop"],
            {},
            "--loop is 'uvlop', but must be one of auto, uvloop, asyncio, did you mean 'uvloop'?",
        ),
        (["--env", "DEBUG"], {}, "--env is 'DEBUG', but must be NAME=VALUE"),
        (["--unix-mode", "rw"], {}, "--unix-mode is 'rw', but must be permissions in octal as text, such as '660'"),
        (["--hooks", "hooks"], {}, "--hooks is 'hooks', but must be module:function"),
        (["--worker", 2], {}, "there is no flag --worker, did you mean '--workers'?"),
        (
            [],
            {"PREFORK_WORKRS": "2"},
            "PREFORK_WORKRS is set, but there is no such setting, did you mean PREFORK_WORKERS?",
        ),
        ([], {"PREFORK_THREADS": "x"}, "PREFORK_THREADS is 'x', but must be a whole number from 0 to 1024"),
        (["--user", "no-such-user"], {}, "user 'no-such-user' does not exist on this machine"),
        (["--group", "no-such-group"], {}, "group 'no-such-group' does not exist on this machine"),
        (["--unix-owner", ":no-such-group"], {}, "group 'no-such-group' does not exist on this machine"),
        (["--chdir", "nowhere"], {}, "chdir 'nowhere' is not possible: no such file or directory"),
        (["--chdir", "app.py"], {}, "chdir 'app.py' is not possible: not a directory"),
        (["--error-log", "no/e.log"], {}, "error_log 'no/e.log' cannot be opened: no such file or directory"),
        (["--access-log", "."], {}, "access_log '.' cannot be opened: is a directory"),
        (["--pidfile", "no/pid"], {}, "pidfile '{place}/no/pid' cannot be written: no such file or directory"),
        (["--keyfile", "k.pem"], {}, "keyfile is set and certfile is not: there is no certificate it could belong to"),
    ],
)
def test_a_setting_that_cannot_work(fails, place, arguments, variables, sentence):
    """One line that names it as it was spelt, and code 2."""
    failure = fails("app:app", "--bind", "unix:app.sock", *arguments, **variables)

    assert (failure.code, failure.sentence) == (2, sentence.format(place=place))


def test_no_application_at_all(fails):
    """What one types second."""
    failure = fails()

    assert failure.code == 2
    assert failure.sentence == "no application was named: it is module:attribute, such as 'app:handler'"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "prefork.toml",
            b"workrs = 2\n",
            "there is no setting 'workrs' for prefork.toml, did you mean 'workers'?",
        ),
        (
            "pyproject.toml",
            b"[tool.prefork]\nworkrs = 2\n",
            "there is no setting 'workrs' for [tool.prefork] of pyproject.toml, did you mean 'workers'?",
        ),
        (
            "prefork.toml",
            b"workers = 'many'\n",
            "workers in prefork.toml is 'many', but must be a whole number from 1 to 1024 or auto",
        ),
        (
            "prefork.toml",
            b"workers = = 2\n",
            "configuration file prefork.toml is not valid TOML: Invalid value (at line 1, column 11)",
        ),
        (
            "prefork.toml",
            "workers = 2 # für alle".encode("latin-1"),
            "configuration file prefork.toml is not text in UTF-8, which TOML is",
        ),
        (
            "prefork.toml",
            b"[tool.prefork]\nworkers = 2\n",
            "prefork.toml has a heading [tool...], but its settings stand at the top, without any",
        ),
    ],
)
def test_a_file_that_cannot_be_understood(fails, place, name, text, sentence):
    """It names the file, since nobody may have asked for it."""
    (place / name).write_bytes(text)
    failure = fails("app:app")

    assert (failure.code, failure.sentence) == (2, sentence)


@pytest.mark.parametrize(("path", "why"), [("no.toml", "no such file or directory"), (".", "is a directory")])
def test_a_configuration_file_that_is_none(fails, path, why):
    """Asked for with --config."""
    failure = fails("app:app", "--config", path)

    assert (failure.code, failure.sentence) == (2, f"configuration file {path} cannot be read: {why}")


@needs_root
def test_files_that_belong_to_somebody_else(fails):
    """Started as an ordinary user, where an administrator has made them."""
    with TemporaryDirectory() as name:  # pytest's folders are for its own user alone
        folder = Path(name).resolve()
        folder.chmod(0o755)
        for file in ("c.toml", "c.pem"):
            (folder / file).touch(0o600)
        config = fails("app:app", "--config", "c.toml", as_nobody=True, cwd=folder)
        certificate = fails("app:app", "--certfile", "c.pem", as_nobody=True, cwd=folder)
        log = fails("app:app", "--error-log", "c.pem", as_nobody=True, cwd=folder)
        socket_file = fails("app:app", "--bind", "unix:s.sock", as_nobody=True, cwd=folder)

    assert (config.code, config.sentence) == (2, "configuration file c.toml cannot be read: permission denied")
    assert (certificate.code, certificate.sentence) == (
        2,
        f"the certificate in {folder}/c.pem cannot be read: permission denied",
    )
    assert (log.code, log.sentence) == (2, "error_log 'c.pem' cannot be opened: permission denied")
    assert socket_file.code == 1
    assert socket_file.sentence == (
        f"cannot listen on unix:s.sock: user {NOBODY} may not create or remove a socket in {folder}"
    )


@needs_root
def test_a_folder_that_may_not_be_searched_is_no_crash(fails, place):
    """`sudo -u nobody` inside one's home: the file that might be there is not seen, the application neither."""
    place.chmod(0o700)
    failure = fails("app:app", "--bind", FREE, as_nobody=True)

    assert failure.code == 4
    assert failure.boot_failure.startswith("no module 'app' (for 'app:app')")


@needs_root
def test_another_user_is_only_for_root(fails):
    """Found out by the worker that should become that user."""
    failure = fails("app:app", "--bind", FREE, "--user", "root", as_nobody=True)

    assert failure.code == 3
    assert failure.boot_failure.startswith("cannot become user root")


def test_a_folder_that_was_deleted_under_our_feet(place):
    """A deployment that replaced it, and a shell that is still inside."""
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    command = ["/bin/sh", "-c", script, "sh", sys.executable, "-m", "prefork", "serve", "app:app", "--bind", FREE]
    with Server(None, command=command, cwd=place) as server:
        code = server.wait_exit()

    assert code == 1
    assert server.log == "prefork: the current directory does not exist any more: change to one that does\n"


def test_the_pidfile_of_a_server_that_is_alive(fails, place):
    """It keeps its file, and the socket that was already bound goes."""
    (place / "app.pid").write_text(f"{os.getpid()}\n")
    failure = fails("app:app", "--bind", "unix:app.sock", "--pidfile", "app.pid")

    assert failure.code == 1
    assert failure.sentence == (
        f"pidfile '{place}/app.pid' belongs to process {os.getpid()}, which is alive: stop it, "
        "or remove the file if that process is another program"
    )
    assert (place / "app.pid").read_text() == f"{os.getpid()}\n"


def test_a_pidfile_and_a_socket_go_with_a_server_that_cannot_boot(fails):
    """`fails` compares the folder before and after."""
    assert fails("app:nothing", "--bind", "unix:app.sock", "--pidfile", "app.pid").code == 4


# ---- certificates ----


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    """Two certificates with their keys."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl program is not installed, and makes the certificates")
    folder = tmp_path_factory.mktemp("pem")
    for name in ("one", "other"):
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
        names = ("-subj", "/CN=localhost", "-keyout", f"{name}.key", "-out", f"{name}.crt")
        command = ["openssl", "req", "-x509", *curve, "-nodes", "-days", "2", *names]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    ("certificate", "key", "sentence"),
    [
        ("no.crt", None, "there is no file {pem}/no.crt to take the certificate from"),
        (".", None, "the certificate in {pem} cannot be read: is a directory"),
        (
            "one.key",
            None,
            "{pem}/one.key holds no certificate: a PEM file with a line like -----BEGIN CERTIFICATE----- is needed",
        ),
        (
            "one.crt",
            None,
            "{pem}/one.crt holds no private key: a PEM file with a line like PRIVATE KEY----- is needed",
        ),
        ("one.crt", "no.key", "there is no file {pem}/no.key to take the private key from"),
        (
            "one.crt",
            "other.key",
            "the private key in {pem}/other.key does not belong to the certificate in {pem}/one.crt",
        ),
    ],
)
def test_a_certificate_that_cannot_be_used(fails, pem, certificate, key, sentence):
    """The file is named, and what is wrong with it."""
    flags = ["--certfile", f"{pem}/{certificate}", *(["--keyfile", f"{pem}/{key}"] if key else [])]
    failure = fails("app:app", "--bind", "unix:app.sock", *flags)

    assert (failure.code, failure.sentence) == (2, sentence.format(pem=pem))


# ---- hooks ----


@pytest.mark.parametrize(
    ("target", "module", "sentence", "has_traceback"),
    [
        ("nohooks:f", "", "hooks: no module 'nohooks' (for 'nohooks:f'): it is looked for in the current", False),
        ("mine:f", "", "hooks: module 'mine' ({place}/mine.py) has no attribute 'f' (for 'mine:f')", False),
        ("app:number", "", "hooks 'app:number' is of type int, but must be a function of the cluster", False),
        (
            "mine:f",
            "def f(): ...\n",
            "hooks 'mine:f' failed: TypeError: f() takes 0 positional arguments but 1 was given",
            False,
        ),
        (
            "mine:f",
            "1 / 0\n",
            "hooks: module 'mine' was found, but importing it failed: ZeroDivisionError: division by zero",
            True,
        ),
        (
            "mine:f",
            "def f(cluster):\n    1 / 0\n",
            "hooks 'mine:f' failed: ZeroDivisionError: division by zero",
            True,
        ),
    ],
)
def test_hooks_that_cannot_be_called(fails, place, target, module, sentence, has_traceback):
    """Nothing is forked; where it was the function that failed, its own traceback follows."""
    (place / "mine.py").write_text(module)
    failure = fails("app:app", "--bind", "unix:app.sock", "--hooks", target)
    told = next(line for line in failure.text.splitlines() if not STARTING.match(line))

    assert failure.code == 2
    assert told.startswith("prefork: " + sentence.format(place=place))
    assert failure.text.count("Traceback (most recent call last)") == has_traceback
    assert failure.text.count(f'File "{place}/mine.py"') == has_traceback
    if not has_traceback:
        assert failure.sentence
