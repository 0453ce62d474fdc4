"""Settings: declared once, read from four places, and named in every complaint."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.config import SETTINGS, Settings
from prefork.cpus import available_cpus
from prefork.errors import ConfigError
from prefork.kinds import Mode, Seconds, Size, Switch, Whole

ROOT = Path(__file__).parent.parent
QUANTITIES = (Seconds, Size, Whole)


@pytest.fixture
def load(tmp_path):
    """`Settings.load` in an empty directory and environment, with an application."""

    def load(environ=None, flags=None, **keywords):
        return Settings.load({"app": "app:handler"} | keywords, flags=flags, environ=environ or {}, cwd=tmp_path)

    return load


@pytest.fixture
def refusal(load):
    """The sentence with which the settings are refused."""

    def refusal(environ=None, flags=None, **keywords):
        with pytest.raises(ConfigError) as caught:
            load(environ, flags, **keywords)
        return str(caught.value)

    return refusal


# ---- the declaration ----


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_is_explained(setting):
    """Flag, page and errors come from here, so nothing may be missing."""
    assert setting.help.endswith(".")
    assert setting.group
    assert setting.kind.allowed
    assert setting.shown_default
    assert setting.kind.metavar or isinstance(setting.kind, Switch)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_default_would_be_accepted(setting):
    """A default that its own check refuses could not be spelled out by a user."""
    if setting.default in ("", None):
        return
    assert setting.kind.read(setting.default) == setting.default


@pytest.mark.parametrize(
    "setting", [s for s in SETTINGS.values() if isinstance(s.kind, QUANTITIES)], ids=lambda s: s.name
)
def test_every_quantity_says_its_unit(setting):
    """30 what? The word is in the metavar, in the name or in the help."""
    words = f"{setting.kind.allowed} {setting.help} {setting.name}".lower()

    assert re.search("second|bytes|threads|processes|connections|fields", words)


def test_every_group_stands_together():
    """`--help` prints a group once."""
    groups = [setting.group for setting in SETTINGS.values()]

    assert [g for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g] == list(dict.fromkeys(groups))


def test_the_page_of_the_docs_is_what_the_declaration_says():
    """If this fails: python docs/settings.py."""
    page = runpy.run_path(str(ROOT / "docs" / "settings.py"))["page"]()

    assert (ROOT / "docs" / "settings.md").read_text() == page


def test_settings_cannot_be_changed_behind_a_running_server(load):
    """Master and workers share one value by fork; a change in one would be a lie in the others."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().workers = 3


def test_the_password_of_the_key_is_not_printed(load):
    """repr() ends up in logs and tracebacks."""
    assert "hunter2" not in repr(load(certfile="c.pem", keyfile_password="hunter2"))


# ---- sources ----


def test_defaults_serve_on_localhost_only(load):
    """Nobody publishes a development server by accident."""
    settings = load()

    assert settings.bind == ("127.0.0.1:8000",)
    assert (settings.workers, settings.sharing, settings.threads) == ("auto", "inherit", 4)


def test_flag_wins_over_environment_over_file_over_default(load, tmp_path):
    """The nearer to the moment of starting, the more it counts."""
    (tmp_path / "prefork.toml").write_text("threads = 1\nbacklog = 1\nlimit-fields = 1\n")
    environ = {"PREFORK_THREADS": "2", "PREFORK_BACKLOG": "2"}
    settings = load(environ, flags={"threads": "3"})

    assert (settings.threads, settings.backlog, settings.limit_fields, settings.workers) == (3, 2, 1, "auto")


def test_a_keyword_counts_as_a_flag_does(load):
    """`serve(app, threads=3)` is what the program says, whatever the environment."""
    assert load({"PREFORK_THREADS": "2"}, threads=3).threads == 3


def test_none_means_not_given(load):
    """So that a caller may pass on an optional argument of his own."""
    assert load({"PREFORK_THREADS": "2"}, threads=None).threads == 2


def test_the_table_of_pyproject_is_read(load, tmp_path):
    """The project's settings live with the project."""
    (tmp_path / "pyproject.toml").write_text('[tool.prefork]\nbind = ["127.0.0.1:1", "unix:/x"]\npreload = true\n')
    settings = load()

    assert (settings.bind, settings.preload) == (("127.0.0.1:1", "unix:/x"), True)
    assert settings.config == str(tmp_path / "pyproject.toml")


def test_a_pyproject_of_somebody_else_is_left_alone(load, tmp_path):
    """Most have no table for us."""
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")

    assert load().config == ""


def test_prefork_toml_wins_over_pyproject(load, tmp_path):
    """One file counts, not a mixture of two."""
    (tmp_path / "prefork.toml").write_text("threads = 1\n")
    (tmp_path / "pyproject.toml").write_text("[tool.prefork]\nthreads = 2\nbacklog = 2\n")
    settings = load()

    assert (settings.threads, settings.backlog) == (1, 2048)


@pytest.mark.parametrize("how", ["flags", "environ", "keyword"])
def test_the_file_may_be_named(load, tmp_path, how):
    """Relative to the current directory."""
    (tmp_path / "deploy.toml").write_text("threads = 7\n")
    (tmp_path / "prefork.toml").write_text("threads = 1\n")
    where = {"flags": {"flags": {"config": "deploy.toml"}}, "environ": {"environ": {"PREFORK_CONFIG": "deploy.toml"}}}

    assert load(**where.get(how, {"config": "deploy.toml"})).threads == 7


def test_lists_in_the_environment_are_separated_by_commas(load):
    """There is no other way to repeat a variable."""
    assert load({"PREFORK_BIND": "127.0.0.1:1, unix:/x,"}).bind == ("127.0.0.1:1", "unix:/x")


def test_a_table_of_variables_becomes_pairs(load, tmp_path):
    """The natural way to write them in TOML."""
    (tmp_path / "prefork.toml").write_text('env = { DEBUG = 1, NAME = "a,b" }\n')

    assert load().env == ("DEBUG=1", "NAME=a,b")


def test_an_empty_variable_counts_as_unset(load):
    """Compose files set `X=${Y}` where Y may be nothing."""
    assert load({"PREFORK_THREADS": "", "PREFORK_USER": ""}).threads == 4


def test_what_kubernetes_sets_for_a_service_called_prefork_is_no_setting(load):
    """Every pod of the namespace gets these."""
    load(
        {
            "PREFORK_SERVICE_HOST": "10.0.0.1",
            "PREFORK_SERVICE_PORT": "80",
            "PREFORK_SERVICE_PORT_HTTP": "80",
            "PREFORK_PORT": "tcp://10.0.0.1:80",
            "PREFORK_PORT_80_TCP": "tcp://10.0.0.1:80",
            "PREFORK_PORT_80_TCP_ADDR": "10.0.0.1",
        }
    )


def test_the_application_may_be_an_object(load):
    """`prefork.serve(handler)`."""

    def handler(request):
        return request

    assert load(app=handler).app is handler


# ---- complaints ----


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"flags": {"workers": "many"}},
            "--workers is 'many', but must be a whole number from 1 to 1024 or auto",
        ),
        (
            {"flags": {"sharing": "inherits"}},
            "--sharing is 'inherits', but must be one of inherit, reuseport, handoff, did you mean 'inherit'?",
        ),
        (
            {"environ": {"PREFORK_LIMIT_BODY": "10x"}},
            "PREFORK_LIMIT_BODY is '10x', but must be a number of bytes, 0 or more, such as 8190, 16k, 10m or 1g",
        ),
        (
            {"environ": {"PREFORK_WORKER": "2"}},
            "PREFORK_WORKER is set, but there is no such setting, did you mean PREFORK_WORKERS?",
        ),
        (
            {"flags": {"pick": "round_robbin"}},
            "--pick is 'round_robbin', but must be one of least_connections, round_robin, least_busy, sticky:ip, sticky:header:NAME, sticky:cookie:NAME, MODULE:FUNCTION, did you mean 'round_robin'?",
        ),
        ({"pick": "round_robin"}, "pick is 'round_robin' and sharing is 'inherit': only with handoff is there somebody who picks"),
        (
            {"pick": "sticky:cookie:sid", "sharing": "handoff", "certfile": "c"},
            "pick is 'sticky:cookie:sid' and certfile is set: the master cannot read what is encrypted, only sticky:ip can be",
        ),
        (
            {"pick": "sticky:ip", "sharing": "handoff", "proxy_protocol": True},
            "pick is 'sticky:ip' and proxy_protocol is set: the master sees the proxy's address, and no request before its header",
        ),
        ({"environ": {"PREFORK_X": "2"}}, "PREFORK_X is set, but there is no such setting"),
        ({"worker": 2}, "there is no setting 'worker', did you mean 'workers'?"),
        ({"graceful_timeout": -1}, "graceful_timeout is -1, but must be a number of seconds, 0 or more"),
        ({"preload": "perhaps"}, "preload is 'perhaps', but must be yes or no (true, false, on, off, 1 and 0 will do)"),
        ({"env": ["1A=x"]}, "env is ['1A=x'], but must be NAME=VALUE"),
        ({"app": None}, "no application was named: it is module:attribute, such as 'app:handler'"),
        ({"bind": []}, "bind is empty: at least one address is needed, such as 127.0.0.1:8000"),
        ({"bind": [":80", ":80"]}, "bind names ':80' twice"),
        ({"keyfile": "k"}, "keyfile is set and certfile is not: there is no certificate it could belong to"),
        ({"certfile": ["a", "b"], "keyfile": ["k"]}, "keyfile names 1 and certfile 2: there must be a key for each certificate, in the same order, or none"),
        ({"client_ca": "c"}, "client_ca is set and certfile is not: only a server with TLS can ask for certificates"),
        ({"client_cert": "optional", "certfile": "c"}, "client_cert is 'optional' and client_ca is not set: nobody is asked for one"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(refusal, given, sentence):
    """The sentence is all that a user sees."""
    assert refusal(**({"app": "app:handler"} | given)) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("threads = 'x'", "threads in prefork.toml is 'x', but must be a whole number from 0 to 1024"),
        ("thread = 1", "there is no setting 'thread' for prefork.toml, did you mean 'threads'?"),
        ("config = 'x'", "config cannot be set in prefork.toml: that is where it would point to"),
        (
            "unix_mode = 660",
            "unix_mode in prefork.toml is 660, but must be permissions in octal as text, such as '660'",
        ),
        ("threads = true", "threads in prefork.toml is True, but must be a whole number from 0 to 1024"),
    ],
)
def test_a_wrong_key_of_the_file_is_named_with_the_file(refusal, tmp_path, text, sentence):
    """So the user knows what to open."""
    (tmp_path / "prefork.toml").write_text(text)

    assert refusal() == sentence


def test_a_wrong_key_of_pyproject_is_named_with_its_table(refusal, tmp_path):
    """There are many tables in that file."""
    (tmp_path / "pyproject.toml").write_text("[tool.prefork]\nthreads = -1\n")

    assert refusal() == ("threads in [tool.prefork] of pyproject.toml is -1, but must be a whole number from 0 to 1024")


def test_a_file_that_is_not_there_or_not_toml_is_named(refusal, tmp_path):
    """The two ways in which a configuration file is unreadable to beginners."""
    (tmp_path / "bad.toml").write_text("threads = = 1")

    assert refusal(config="none.toml") == (
        f"configuration file {tmp_path}/none.toml cannot be read: no such file or directory"
    )
    assert refusal(config="bad.toml").startswith(f"configuration file {tmp_path}/bad.toml is not valid TOML: ")


def test_a_file_that_may_not_be_read_is_named(refusal, tmp_path):
    """Root may read everything, so a directory stands in for it there."""
    (tmp_path / "dir.toml").mkdir()

    assert refusal(config="dir.toml") == f"configuration file {tmp_path}/dir.toml cannot be read: is a directory"


# ---- kinds ----


@given(st.integers(0, 2**40), st.sampled_from(["", "k", "m", "g"]), st.booleans(), st.sampled_from(["", "b"]))
def test_sizes_count_in_1024s(number, unit, is_upper, suffix):
    """16k is 16384, as in nginx; case and a final b do not matter."""
    text = f"{number}{unit}{suffix if unit else ''}"
    factor = 1024 ** ["", "k", "m", "g"].index(unit)

    assert Size(0).read(text.upper() if is_upper else text) == number * factor


@given(st.text() | st.floats() | st.booleans() | st.none() | st.binary() | st.lists(st.integers()))
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_whatever_a_value_is_it_is_read_or_refused(setting, value):
    """No input ends in a traceback: the three errors below are what becomes a sentence."""
    try:
        read = setting.kind.read(value)
    except (ValueError, TypeError, AttributeError):
        return
    assert read is not None


@given(st.text() | st.floats() | st.integers())
def test_seconds_are_finite_and_not_negative(value):
    """nan and inf are floats that no timer takes."""
    try:
        seconds = Seconds().read(value)
    except ValueError:
        return
    assert 0 <= seconds < float("inf")


@pytest.mark.parametrize("value", [True, "1_000", "+5", "٣", "1.5", 1.0, "", "1e3"])
def test_a_whole_number_has_one_spelling(value):
    """int() takes more than people mean."""
    with pytest.raises(ValueError):
        Whole(0, 10_000).read(value)


@pytest.mark.parametrize(("text", "mode"), [("660", 0o660), ("0660", 0o660), ("0o600", 0o600), ("0", 0)])
def test_a_mode_is_octal(text, mode):
    """As chmod takes it."""
    assert Mode().read(text) == mode


@pytest.mark.parametrize("value", ["888", "1777", "rw", 0o660, "-1"])
def test_what_is_not_octal_is_no_mode(value):
    """A number has lost its base: TOML's 660 is decimal."""
    with pytest.raises(ValueError):
        Mode().read(value)


@pytest.mark.parametrize("value", ["off", ""])
def test_the_server_header_may_be_off(load, value):
    """Empty is what response heads test for."""
    assert load(server_header=value).server_header == ""


@pytest.mark.parametrize("value", ["a\r\nx: y", "é", " a", "a\x00"])
def test_the_server_header_cannot_inject_a_line(refusal, value):
    """It stands in every response."""
    assert "must be printable ASCII, or off" in refusal(server_header=value)


# ---- how many workers are "auto" ----


def cgroup(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


ALL = len(os.sched_getaffinity(0))
BASE = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, ALL),
        ({"proc/self/cgroup": "0::/\n", f"{BASE}/cpu.max": "max 100000\n"}, ALL),
        ({"proc/self/cgroup": "0::/\n", f"{BASE}/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", f"{BASE}/cpu.max": "100001 100000\n"}, min(2, ALL)),
        (
            {"proc/self/cgroup": "0::/a/b\n", f"{BASE}/a/cpu.max": "10000 100000", f"{BASE}/a/b/cpu.max": "max 100000"},
            1,
        ),
        ({"proc/self/cgroup": "0::/only/on/the/host\n", f"{BASE}/cpu.max": "100000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/x\n0::/\n",
                f"{BASE}/cpu,cpuacct/cpu.cfs_quota_us": "90000\n",
                f"{BASE}/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                f"{BASE}/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                f"{BASE}/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            ALL,
        ),
    ],
    ids=["none", "unlimited", "half", "rounded up", "the parent's", "a container", "version 1", "version 1 unlimited"],
)
def test_auto_is_no_more_than_the_cgroup_allows(tmp_path, files, count):
    """A container with one CPU on a machine with 64 must not start 64 workers."""
    cgroup(tmp_path, files)

    assert available_cpus({}, tmp_path) == count


def test_python_cpu_count_decides_where_it_is_set(tmp_path):
    """As for os.process_cpu_count() since Python 3.13."""
    assert available_cpus({"PYTHON_CPU_COUNT": "7"}, tmp_path) == 7
    assert available_cpus({"PYTHON_CPU_COUNT": "default"}, tmp_path) == ALL


def test_auto_respects_the_affinity_mask(tmp_path):
    """`taskset -c 0 prefork serve` is one worker."""
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os._exit(available_cpus({}, tmp_path))

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_worker_count_is_the_number_that_was_asked_for(load):
    """And "auto" is counted when the server starts."""
    assert load(workers="3").worker_count == 3
    assert load().worker_count == available_cpus()
