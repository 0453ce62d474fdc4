"""The command line as far as it goes without a server: help, versions, and what it says of mistakes."""

from __future__ import annotations

import pytest

from prefork.config import SETTINGS
from prefork.control import cli
from prefork.errors import ListenError
from prefork.kinds import Switch

WIDTH = 80  # columns of the terminal that nobody has widened


@pytest.fixture(autouse=True)
def empty_place(tmp_path, monkeypatch):
    """No configuration file and no variable of the machine that runs the tests."""
    monkeypatch.chdir(tmp_path)
    for setting in SETTINGS.values():
        monkeypatch.delenv(setting.variable, raising=False)
    monkeypatch.setenv("COLUMNS", str(WIDTH))


@pytest.fixture
def served(monkeypatch):
    """The settings with which the server would have been started, one per start."""
    calls = []
    monkeypatch.setattr(cli, "serve_command", lambda settings, **_: calls.append(settings) or 0)
    return calls


@pytest.fixture
def prefork(capfd):
    """Run a command line: (exit code, stdout, stderr)."""

    def prefork(*arguments):
        code = cli.run(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return prefork


# ---- help ----


def test_help_has_every_flag_and_fits_the_terminal(prefork):
    """A line that wraps in the terminal cannot be read in columns."""
    code, out, _ = prefork("serve", "--help")

    assert code == 0
    assert [setting.flag for setting in SETTINGS.values() if setting.flag not in out] == []
    assert [line for line in out.splitlines() if len(line) > WIDTH] == []


def test_help_is_grouped_as_the_settings_are(prefork):
    """Forty flags in one heap are not found."""
    out = prefork("serve", "--help")[1]
    headings = [line.rstrip(":") for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]

    assert headings == [*dict.fromkeys(setting.group for setting in SETTINGS.values()), "Help"]


def test_help_names_defaults_variables_signals_and_exit_codes(prefork):
    """The four questions after "which flag"."""
    out = prefork("serve", "-h")[1]

    assert "[127.0.0.1:8000]" in out
    assert "PREFORK_WORKERS" in out
    assert "USR1 reopens the logs" in " ".join(out.split())
    assert "Exit codes: 0 stopped as told, 1 it cannot start here" in " ".join(out.split())


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_prefork_alone_shows_its_commands(prefork, arguments):
    """What one types first."""
    code, out, err = prefork(*arguments)

    assert (code, err) == (0, "")
    assert "serve  Serve an application" in out


def test_version_is_the_distributions(prefork):
    """As the installer knows it."""
    code, out, _ = prefork("--version")

    assert code == 0
    assert out.startswith("prefork")


# ---- flags become settings ----


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_has_its_flag(prefork, served, setting):
    """Declared once, and nothing to add here."""
    values = {
        "app": ["other:app"],
        "config": None,  # names a file; tests/test_config.py has it
        "keyfile": ["--keyfile", "k.pem", "--certfile", "c.pem"],
        "keyfile_password": ["--keyfile-password", "x", "--certfile", "c.pem"],
        "client_ca": ["--client-ca", "ca.pem", "--certfile", "c.pem"],
        "client_cert": ["--client-cert", "optional", "--client-ca", "ca.pem", "--certfile", "c.pem"],
        "env": ["--env", "A=1", "--env", "B=2"],
        "root_path": ["--root-path", "/api"],
        "unix_mode": ["--unix-mode", "660"],
        "hooks": ["--hooks", "a:b"],
        "ws_compression": ["--no-ws-compression"],
        "accept_gate": ["--no-accept-gate"],
        "pick": ["--sharing", "handoff", "--pick", "round_robin"],
    }
    sample = setting.kind.words[-1] if setting.kind.words else "777"
    arguments = values.get(setting.name, [setting.flag] if isinstance(setting.kind, Switch) else [setting.flag, sample])
    if arguments is None:
        return
    code, _, err = prefork("serve", *([] if setting.name == "app" else ["app:handler"]), *arguments)

    assert (code, err) == (0, "")
    assert getattr(served[0], setting.name) != (setting.default if arguments[-1] != str(setting.default) else object())


def test_a_switch_can_be_switched_off_again(prefork, served, monkeypatch):
    """The file or the environment of the machine may say yes."""
    monkeypatch.setenv("PREFORK_PRELOAD", "yes")
    prefork("serve", "app:handler")
    prefork("serve", "app:handler", "--no-preload")

    assert [settings.preload for settings in served] == [True, False]


def test_flag_wins_over_variable_over_file(prefork, served, monkeypatch, tmp_path):
    """The real environment and the real current directory."""
    (tmp_path / "pyproject.toml").write_text(
        "[tool.prefork]\napp = 'filed:app'\nthreads = 1\nbacklog = 1\nworkers = 1\n"
    )
    monkeypatch.setenv("PREFORK_THREADS", "2")
    monkeypatch.setenv("PREFORK_BACKLOG", "2")
    prefork("serve", "--threads", "3")

    assert [(s.app, s.threads, s.backlog, s.workers) for s in served] == [("filed:app", 3, 2, 1)]


def test_bind_may_be_repeated(prefork, served):
    """And nothing of the default is left then."""
    prefork("serve", "app:handler", "--bind", ":1", "--bind", "unix:/x,y")

    assert served[0].bind == (":1", "unix:/x,y")


# ---- mistakes ----


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--workrs", "3", "a:b"], "there is no flag --workrs, did you mean '--workers'?"),
        (["serve", "--no-preloud", "a:b"], "there is no flag --no-preloud, did you mean '--no-preload'?"),
        (["serve", "--xyzzy", "a:b"], "there is no flag --xyzzy"),
        (["serv", "a:b"], "there is no command 'serv', did you mean 'serve'?"),
        (["app:handler"], "there is no command 'app:handler', did you mean 'prefork serve app:handler'?"),
        (["serve", "a:b", "--workers"], "option '--workers' requires an argument"),
        (["serve", "a:b", "c:d"], "got unexpected extra argument (c:d)"),
        (["serve"], "no application was named: it is module:attribute, such as 'app:handler'"),
        (
            ["serve", "a:b", "--workers", "0"],
            "--workers is '0', but must be a whole number from 1 to 1024 or auto",
        ),
        (
            ["serve", "a:b", "--sharing", "reuse-port"],
            "--sharing is 'reuse-port', but must be one of inherit, reuseport, handoff, did you mean 'reuseport'?",
        ),
        (["serve", "a b"], "APP is 'a b', but must be module:attribute, such as 'app:handler', or the application itself"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_code_2(prefork, served, arguments, sentence):
    """It names what was written, what would be right, and starts nothing."""
    assert prefork(*arguments) == (2, "", f"prefork: {sentence}\n")
    assert served == []


def test_what_fails_in_the_server_is_one_line_and_code_1(prefork, monkeypatch):
    """The command was right; the machine is not. No traceback for what is expected."""

    def serve_command(settings, *, is_last_act):
        raise ListenError("127.0.0.1:8000 is in use by another process")

    monkeypatch.setattr(cli, "serve_command", serve_command)

    assert prefork("serve", "a:b") == (1, "", "prefork: 127.0.0.1:8000 is in use by another process\n")


def test_the_exit_code_is_the_servers(prefork, monkeypatch):
    """3 and 4 tell a service manager that the application cannot start."""
    monkeypatch.setattr(cli, "serve_command", lambda settings, **_: 4)

    assert prefork("serve", "a:b")[0] == 4


def test_an_interrupt_before_the_server_runs_is_code_130(prefork, monkeypatch):
    """As shells expect of SIGINT; a traceback would look like a crash."""

    def serve_command(settings, *, is_last_act):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "serve_command", serve_command)

    assert prefork("serve", "a:b")[0] == 130


def test_a_bug_keeps_its_traceback(prefork, monkeypatch):
    """One line would hide where it is."""

    def serve_command(settings, *, is_last_act):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "serve_command", serve_command)

    with pytest.raises(ZeroDivisionError):
        prefork("serve", "a:b")


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--port", "there is no flag --port: the address is one flag here: --bind HOST:PORT"),
        ("--factory", "there is no flag --factory: a factory is called by its name here: 'module:factory()'"),
        ("-k", "there is no flag -k: an application is recognised by its signature here, or by --interface"),
    ],
)
def test_flags_of_the_peers_are_translated(flag, sentence, capsys):
    """Who changes from another server types its flags for a week."""
    assert cli.run(["serve", "app:app", flag, "x"]) == 2
    assert capsys.readouterr().err == f"prefork: {sentence}\n"
