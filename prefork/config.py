"""Every setting, declared once: type, default, unit, group and help are the fields of `Settings`.

Flags, keywords of `serve()`, environment variables, keys of the configuration file,
`--help`, the checks and docs/settings.md are all derived from there. Nothing here acts
on a setting: no socket is bound, no user looked up, no file read but the configuration.

The first source that has a setting wins: flag or keyword, environment, file, default.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from prefork.cpus import available_cpus
from prefork.errors import ConfigError, did_you_mean, reason_of
from prefork.kinds import (
    Application,
    Choice,
    Header,
    Kind,
    Listed,
    Mode,
    Peer,
    Picking,
    Seconds,
    Several,
    Size,
    Switch,
    Text,
    Whole,
)

# Every worker has a slot of shared memory and two descriptors in the master. A number
# beyond this is a slip of the finger, and forking it would take the machine down.
MOST_WORKERS = 1024


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known of a setting besides its value."""

    name: str
    kind: Kind
    default: Any
    group: str
    help: str

    @property
    def flag(self) -> str:
        """How the command line spells it; the application has no flag but a place."""
        return "APP" if self.name == "app" else "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "PREFORK_" + self.name.upper()

    @property
    def shown_default(self) -> str:
        return self.kind.show(self.default)


def _declare(default: Any, kind: Kind, group: str, help: str, *, is_secret: bool = False) -> Any:  # noqa: A002 - reads as what it is
    return field(default=default, repr=not is_secret, metadata={"kind": kind, "group": group, "help": help})


SERVER = "Server"
APPLICATION = "Application"
PROCESS = "Process"
TIMEOUTS = "Timeouts"
LIMITS = "Limits"
WEBSOCKET = "WebSocket"
TLS = "TLS"
PROXIES = "Proxies"
LOGGING = "Logging"

_PATH = Text("PATH", "a path", "(?s:.+)")
# As in gunicorn and uvicorn, and whoever may write to a unix socket.
_THIS_MACHINE = ("127.0.0.1", "::1", "unix")
_TARGET = r"[^\s:]+:[^\s:]+"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Values that have been read and checked. `Settings.load` makes one from where users put them."""

    app: Any = _declare(
        "",
        Application("APP", "module:attribute, such as 'app:handler', or the application itself", r"\S+"),
        SERVER,
        "The application: module:attribute or module:factory().",
    )
    bind: tuple[str, ...] = _declare(
        ("127.0.0.1:8000",),
        Several(Text("ADDRESS", "an address, such as 127.0.0.1:8000, [::1]:8000, unix:/path or fd://3", r"\S(.*\S)?")),
        SERVER,
        "Where to listen: HOST:PORT, [HOST]:PORT, :PORT (all IPv4 interfaces), PORT (127.0.0.1), unix:/path, unix:@abstract "
        "or fd://N; port 0 takes a free one. May be repeated.",
    )
    workers: int | Literal["auto"] = _declare(
        "auto",
        Whole(1, MOST_WORKERS, "auto"),
        SERVER,
        "Processes that serve. auto: the CPUs this process may use, by affinity and cgroup quota.",
    )
    sharing: str = _declare(
        "inherit",
        Choice("inherit", "reuseport", "handoff"),
        SERVER,
        "How workers get connections. inherit: all accept from one socket. reuseport: a socket per worker, spread by "
        "the kernel. handoff: the master accepts and passes each to the worker with the fewest.",
    )
    pick: Any = _declare(
        "least_connections",
        Picking(),
        SERVER,
        "Who gets a connection under --sharing handoff: least_connections, round_robin, least_busy (by event loops and "
        "requests in flight), sticky:ip, sticky:header:NAME or sticky:cookie:NAME (the same worker for the same client, going "
        "by the connection's first request), or MODULE:FUNCTION, called with the connection and the workers that have room.",
    )
    accept_gate: bool = _declare(
        True,
        Switch(),
        SERVER,
        "With --sharing inherit: a worker with more to do than another leaves a new connection to it for up to 3 ms, and "
        "closes kept-alive ones until it is level. Off: whoever wakes first takes it.",
    )
    interface: str = _declare(
        "auto",
        Choice("auto", "native", "asgi", "wsgi"),
        SERVER,
        "What the application speaks. auto looks at its signature and says what it took.",
    )
    threads: int = _declare(
        4,
        Whole(0, 1024),
        SERVER,
        "Threads per worker for WSGI and plain functions (4 as in waitress). 0: in the event loop, one at a time, so that "
        "a slow client of one holds up the others.",
    )
    loop: str = _declare(
        "auto",
        Choice("auto", "uvloop", "asyncio"),
        SERVER,
        "The event loop of the workers. auto: uvloop where it is installed.",
    )
    backlog: int = _declare(
        2048,
        Whole(1, 65535),
        SERVER,
        "Connections the kernel may queue per socket, up to its own limit in net.core.somaxconn (2048 as in gunicorn "
        "and uvicorn).",
    )
    root_path: str = _declare(
        "",
        Text("PATH", "empty or a path such as /api, without a slash at its end", "|/.*[^/]"),
        SERVER,
        "The path under which a proxy publishes the application, whether it takes it off requests or not (ASGI root_path, "
        "WSGI SCRIPT_NAME).",
    )
    lifespan: str = _declare(
        "auto",
        Choice("auto", "on", "off"),
        SERVER,
        "ASGI start-up and shutdown events. auto: on for applications that know them. on: failing is fatal.",
    )

    preload: bool = _declare(
        False,
        Switch(),
        APPLICATION,
        "Import the application once, before the workers are forked: they start at once and share its memory.",
    )
    chdir: str = _declare("", _PATH, APPLICATION, "Change to this directory before the application is loaded.")
    pythonpath: tuple[str, ...] = _declare(
        (),
        Several(_PATH),
        APPLICATION,
        "A directory to import from, after the current one and before all others. May be repeated.",
    )
    env: tuple[str, ...] = _declare(
        (),
        Several(Text("NAME=VALUE", "NAME=VALUE", r"(?s:[A-Za-z_][A-Za-z0-9_]*=.*)")),
        APPLICATION,
        "An environment variable for the application. May be repeated.",
    )
    hooks: str = _declare(
        "",
        Text("MODULE:FUNCTION", "module:function", _TARGET),
        APPLICATION,
        "A function that is called with the cluster, in the master, before the first fork.",
    )

    user: str = _declare(
        "",
        Text("USER", "a user's name or number", r"\S+"),
        PROCESS,
        "Run the workers as this user. It must be able to write where the logs are, for USR1.",
    )
    group: str = _declare(
        "", Text("GROUP", "a group's name or number", r"\S+"), PROCESS, "Run the workers with this group."
    )
    unix_mode: int | None = _declare(
        None, Mode(), PROCESS, "Permissions of the unix sockets, in octal. Otherwise the umask decides."
    )
    unix_owner: str = _declare(
        "",
        Text("USER:GROUP", "user, user:group or :group", r"[^\s:]+(:[^\s:]+)?|:[^\s:]+"),
        PROCESS,
        "Owner of the unix sockets.",
    )
    pidfile: str = _declare("", _PATH, PROCESS, "Write the master's process id into this file; removed at the end.")
    config: str = _declare(
        "",
        _PATH,
        PROCESS,
        "Read settings from this file. Otherwise from ./prefork.toml, or from [tool.prefork] in ./pyproject.toml.",
    )

    graceful_timeout: float = _declare(
        30.0,
        Seconds(),
        TIMEOUTS,
        "At shutdown, time for requests in flight before they are cut (30 as in gunicorn and Kubernetes). 0: they are cut at once.",
    )
    boot_timeout: float = _declare(
        60.0,
        Seconds(),
        TIMEOUTS,
        "Time from a worker's fork until it listens (60 as in puma). 0: no limit.",
    )
    head_timeout: float = _declare(
        10.0,
        Seconds(),
        TIMEOUTS,
        "Time for a request's head, from its first byte to its last; then 408 (Apache: 20, nginx: 60). A new connection "
        "that sends nothing is closed after it, too. 0: no limit.",
    )
    body_timeout: float = _declare(
        30.0,
        Seconds(),
        TIMEOUTS,
        "Longest pause within a request's body; then 408 (Apache: 20, nginx: 60). 0: no limit.",
    )
    keep_alive_timeout: float = _declare(
        65.0,
        Seconds(),
        TIMEOUTS,
        "An idle connection is closed after this time. 65, as in puma, is longer than the 60 of AWS's load balancers, "
        "so it is they who close. 0: no limit.",
    )
    write_timeout: float = _declare(
        60.0,
        Seconds(),
        TIMEOUTS,
        "Longest pause of a client in taking the response; then it is cut (60 as in nginx). 0: no limit.",
    )

    limit_head: int = _declare(
        32768,
        Size(256),
        LIMITS,
        "Largest request head, in bytes; then 431 (32k as in nginx: four buffers of 8k).",
    )
    limit_fields: int = _declare(
        100, Whole(1, 100_000), LIMITS, "Most header fields in a request; then 431 (100 as in Apache)."
    )
    limit_target: int = _declare(
        8190, Size(16), LIMITS, "Longest request target, in bytes; then 414 (8190 as in Apache)."
    )
    limit_body: int = _declare(
        0, Size(0), LIMITS, "Largest request body, in bytes; then 413 (nginx: 1m). 0: the application decides."
    )

    ws_max_size: int = _declare(
        16 * 1024 * 1024,
        Size(1),
        WEBSOCKET,
        "Largest message of a WebSocket client, in bytes, decompressed; then it is closed with 1009 (16m as in uvicorn).",
    )
    ws_ping_interval: float = _declare(
        20.0,
        Seconds(),
        WEBSOCKET,
        "A client that has sent nothing for this long is pinged (20 as in uvicorn). 0: never.",
    )
    ws_ping_timeout: float = _declare(
        20.0,
        Seconds(),
        WEBSOCKET,
        "Time for a client to answer a ping, with whatever it sends; then it is cut (20 as in uvicorn). 0: no limit.",
    )
    ws_compression: bool = _declare(
        True,
        Switch(),
        WEBSOCKET,
        "Compress messages if the client offers it (permessage-deflate).",
    )

    certfile: tuple[str, ...] = _declare(
        (),
        Several(_PATH),
        TLS,
        "Serve HTTPS with this certificate chain (PEM), on every address. May be repeated: clients get the one whose "
        "subjectAltName has the name they ask for, otherwise the first. Changed files are taken up while serving.",
    )
    keyfile: tuple[str, ...] = _declare(
        (),
        Several(_PATH),
        TLS,
        "The certificate's private key (PEM), if it is not in the same file. Repeated as often as --certfile.",
    )
    keyfile_password: str = _declare(
        "",
        Text("TEXT"),
        TLS,
        "Password of the keys. Better in the environment, where ps does not show it.",
        is_secret=True,
    )
    client_ca: str = _declare(
        "", _PATH, TLS, "Ask clients for a certificate that one of these authorities (PEM) has signed."
    )
    client_cert: str = _declare(
        "required",
        Choice("required", "optional"),
        TLS,
        "With --client-ca: whether a client without a certificate is turned away. One with a bad certificate always is.",
    )

    forwarded_allow_ips: tuple[str, ...] = _declare(
        _THIS_MACHINE,
        Listed(Peer(), "ADDRESS,..."),
        PROXIES,
        "Proxies in front of this server, whose word on the client counts (as in gunicorn and uvicorn). Of others the "
        "fields of --forwarded-headers are passed to the application and not obeyed.",
    )
    forwarded_headers: tuple[str, ...] = _declare(
        ("x-forwarded-for", "x-forwarded-proto"),
        Listed(
            Choice(
                "x-forwarded-for",
                "x-forwarded-proto",
                "forwarded",
                "off",
            ),
            "FIELD,...",
        ),
        PROXIES,
        "The fields that these proxies set. Name only those that they overwrite or append to: the others come from the "
        "client. forwarded (RFC 7239) excludes the others. off: none is obeyed.",
    )
    proxy_protocol: bool = _declare(
        False,
        Switch(),
        PROXIES,
        "Every connection begins with a PROXY protocol header, version 1 or 2, from one of --proxy-allow-ips; "
        "connections of others, or without one, are closed.",
    )
    proxy_allow_ips: tuple[str, ...] = _declare(
        _THIS_MACHINE,
        Listed(Peer(), "ADDRESS,..."),
        PROXIES,
        "Who may send PROXY protocol headers.",
    )

    log_level: str = _declare(
        "info", Choice("debug", "info", "warning", "error"), LOGGING, "The least serious line of the error log."
    )
    error_log: str = _declare(
        "-", Text("-|PATH", "- or a path", "(?s:.+)"), LOGGING, "File of the error log; - is stderr."
    )
    access_log: str = _declare(
        "off",
        Text("off|-|PATH", "off, - or a path", "(?s:.+)"),
        LOGGING,
        "File of the access log; - is stdout. Off unless asked for, as in gunicorn.",
    )
    log_format: str = _declare(
        "text", Choice("text", "json"), LOGGING, "Lines of text, or one JSON object a line, in both logs."
    )
    server_header: str = _declare(
        "prefork",
        Header("TEXT|off", "printable ASCII, or off", r"|[!-~]([ -~]*[!-~])?"),
        LOGGING,
        "The Server header of responses; off sends none.",
    )

    @property
    def worker_count(self) -> int:
        """*workers* as a number: "auto" is `available_cpus()`."""
        return min(available_cpus(), MOST_WORKERS) if self.workers == "auto" else self.workers

    @classmethod
    def load(
        cls,
        keywords: Mapping[str, Any] | None = None,
        *,
        flags: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] = ".",
    ) -> Settings:
        """Read and check every setting from *flags*, *keywords*, *environ* (default: the process's) and the file in *cwd*.

        None means "not given". `config` of the result is the file that was read, if any.
        Raises ConfigError, which names the setting as its source spells it.
        """
        sources = [
            Source(dict(flags or {}), lambda setting: setting.flag),
            Source(_known(dict(keywords or {})), lambda setting: setting.name),
            _environment(os.environ if environ is None else environ),
        ]
        named = _find(sources, SETTINGS["config"])
        path = Path(cwd, named) if named else _default_file(Path(cwd))
        if path is not None:
            sources.append(_file(path))
        values = {name: _find(sources, setting) for name, setting in SETTINGS.items()}
        settings = cls(**values | {"config": str(path or "")})
        _check(settings)
        return settings


# Every setting by its name, in the order of the declaration.
SETTINGS: dict[str, Setting] = {
    item.name: Setting(item.name, default=item.default, **item.metadata) for item in fields(Settings)
}


def _check(settings: Settings) -> None:
    """What no setting can tell alone."""
    if not settings.app:
        raise ConfigError("no application was named: it is module:attribute, such as 'app:handler'")
    if not settings.bind:
        raise ConfigError("bind is empty: at least one address is needed, such as 127.0.0.1:8000")
    for address in settings.bind:
        if settings.bind.count(address) > 1 and not address.endswith(":0"):
            raise ConfigError(f"bind names {address!r} twice")
    _check_tls(settings)
    _check_proxies(settings)
    _check_pick(settings)


def _check_pick(settings: Settings) -> None:
    pick = settings.pick
    if pick == SETTINGS["pick"].default:
        return
    if settings.sharing != "handoff":
        raise ConfigError(
            f"pick is {pick!r} and sharing is {settings.sharing!r}: only with handoff is there somebody who picks"
        )
    if not isinstance(pick, str) or not pick.startswith("sticky"):
        return
    if settings.certfile and pick != "sticky:ip":
        raise ConfigError(
            f"pick is {pick!r} and certfile is set: the master cannot read what is encrypted, only sticky:ip can be"
        )
    if settings.proxy_protocol:
        raise ConfigError(
            f"pick is {pick!r} and proxy_protocol is set: the master sees the proxy's address, and no request before its header"
        )


def _check_proxies(settings: Settings) -> None:
    names = settings.forwarded_headers
    for name in ("forwarded", "off"):
        if name in names and len(set(names)) > 1:
            raise ConfigError(f"forwarded_headers is {', '.join(names)}, but {name} stands alone")


def _check_tls(settings: Settings) -> None:
    for name in ("keyfile", "keyfile_password"):
        if getattr(settings, name) and not settings.certfile:
            raise ConfigError(f"{name} is set and certfile is not: there is no certificate it could belong to")
    if settings.keyfile and len(settings.keyfile) != len(settings.certfile):
        raise ConfigError(
            f"keyfile names {len(settings.keyfile)} and certfile {len(settings.certfile)}: there must be a key for each "
            "certificate, in the same order, or none"
        )
    if settings.client_ca and not settings.certfile:
        raise ConfigError("client_ca is set and certfile is not: only a server with TLS can ask for certificates")
    if settings.client_cert != "required" and not settings.client_ca:
        raise ConfigError(f"client_cert is {settings.client_cert!r} and client_ca is not set: nobody is asked for one")


# ---- sources ----


@dataclass(frozen=True, slots=True)
class Source:
    """Settings from one place, and how that place spells their names."""

    values: dict[str, Any]
    spell: Callable[[Setting], str]


def _find(sources: Iterable[Source], setting: Setting) -> Any:
    for source in sources:
        value = source.values.get(setting.name)
        if value is not None:
            return _read(setting, value, source.spell(setting))
    return setting.default


def _read(setting: Setting, value: Any, spelling: str) -> Any:
    try:
        return setting.kind.read(value)
    except (ValueError, TypeError, AttributeError):
        shown = value[0] if isinstance(value, tuple) and len(value) == 1 else value
        raise ConfigError(
            f"{spelling} is {shown!r}, but must be {setting.kind.allowed}{did_you_mean(str(shown).lower(), setting.kind.words)}"
        ) from None


def _known(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    for name in values:
        if name not in SETTINGS:
            raise ConfigError(f"there is no setting {name!r}{where}{did_you_mean(str(name).lower(), SETTINGS)}")
    return values


# What Kubernetes sets in every pod beside a Service called "prefork".
_SERVICE_LINK = re.compile(r"PREFORK_(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_.*)?)?)")


def _environment(environ: Mapping[str, str]) -> Source:
    """Variables PREFORK_*; an empty one counts as unset, since that is what `X=${Y}` often makes."""
    values: dict[str, Any] = {}
    by_variable = {setting.variable: setting for setting in SETTINGS.values()}
    for variable, text in environ.items():
        if not variable.startswith("PREFORK_") or _SERVICE_LINK.fullmatch(variable) or not text:
            continue
        setting = by_variable.get(variable)
        if setting is None:
            raise ConfigError(f"{variable} is set, but there is no such setting{_near_variable(variable)}")
        values[setting.name] = _items(text) if isinstance(setting.kind, Several) else text
    return Source(values, lambda setting: setting.variable)


def _near_variable(variable: str) -> str:
    near = difflib.get_close_matches(variable.removeprefix("PREFORK_").lower(), SETTINGS, 1)
    return f", did you mean {SETTINGS[near[0]].variable}?" if near else ""


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _default_file(cwd: Path) -> Path | None:
    """prefork.toml wins over pyproject.toml, which counts only if it has [tool.prefork]."""
    own = cwd / "prefork.toml"
    # os.path's isfile, which says no where pathlib's raises: in a directory that may not be searched.
    if os.path.isfile(own):
        return own
    project = cwd / "pyproject.toml"
    return project if os.path.isfile(project) and "prefork" in _toml(project).get("tool", {}) else None


def _file(path: Path) -> Source:
    table = _toml(path)
    where = path.name
    if path.name == "pyproject.toml":
        table, where = table.get("tool", {}).get("prefork", {}), "[tool.prefork] of pyproject.toml"
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table of settings, not {table!r}")
    for heading in ("tool", "prefork"):
        if isinstance(table.get(heading), dict):
            raise ConfigError(f"{where} has a heading [{heading}...], but its settings stand at the top, without any")
    values = _known({key.replace("-", "_"): value for key, value in table.items()}, f" for {where}")
    if "config" in values:
        raise ConfigError(f"config cannot be set in {where}: that is where it would point to")
    return Source(values, lambda setting: f"{setting.name} in {where}")


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"configuration file {path} cannot be read: {reason_of(exc)}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"configuration file {path} is not text in UTF-8, which TOML is") from exc
    except ValueError as exc:
        raise ConfigError(f"configuration file {path} is not valid TOML: {exc}") from exc
