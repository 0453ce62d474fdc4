"""Who runs: every server of the race, how it is started, and whether it is at hand.

All get one worker, one application, no access log and no other change but what makes
them do the same as the others: HTTP/1.1, uvloop where they can use it, and as many
threads as their line says.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.peers import Environments

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Order:
    """What a server is asked to do: the application *app* of apps.py, on *port*, within *room*, a directory of its own.

    *tls* is the certificate's and the key's file, if it is to serve HTTPS.
    """

    app: str
    port: int
    room: Path
    tls: tuple[Path, Path] | None = None


Command = Callable[[str, Order], list[str]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the race: *package* by *command*, called through *interface*; *apps* are those that it can serve."""

    name: str
    package: str
    interface: str
    apps: frozenset[str]
    command: Command

    def program(self, environments: Environments) -> str | None:
        """What to run; None if the machine does not have it."""
        if self.package in ("nginx", "node"):
            return shutil.which(self.package) or shutil.which(self.package, path="/usr/sbin:/usr/local/bin")
        return str(environments.python(self.package)) if environments.has(self.package) else None


def _prefork(app: str, more: str = "", *, is_logged: bool = False) -> Command:
    def command(program: str, order: Order) -> list[str]:
        line = [program, "-m", "prefork", "serve", app.format(app=order.app), "--bind", f"127.0.0.1:{order.port}"]
        line += ["--workers", "1", *more.split()]
        if is_logged:
            line += ["--access-log", str(order.room / "access.log")]
        return [*line, *_tls(order, "--certfile", "--keyfile")]

    return command


def _serve(program: str, module: str, interface: str, order: Order, flag: str) -> list[str]:
    """`python -m` *module* with the application in the *interface*, at the order's port: *flag* is `--port` or `--bind`."""
    where = f"127.0.0.1:{order.port}" if flag == "--bind" else str(order.port)
    return [program, "-m", module, f"loadtest.apps:{interface}_{order.app}", flag, where]


def _uvicorn(more: str) -> Command:
    def command(program: str, order: Order) -> list[str]:
        line = [*_serve(program, "uvicorn", "asgi", order, "--port"), "--loop", "uvloop", "--no-access-log"]
        return [*line, *more.split(), *_tls(order, "--ssl-certfile", "--ssl-keyfile")]

    return command


def _granian(interface: str, more: str = "") -> Command:
    def command(program: str, order: Order) -> list[str]:
        line = _serve(program, "granian", interface, order, "--port")
        line += ["--interface", interface, "--workers", "1", "--http", "1", "--no-access-log"]
        if interface != "wsgi":
            line += ["--loop", "uvloop"]
        return [*line, *more.split(), *_tls(order, "--ssl-certificate", "--ssl-keyfile")]

    return command


def _hypercorn(program: str, order: Order) -> list[str]:
    line = [*_serve(program, "hypercorn", "asgi", order, "--bind"), "--workers", "1", "--worker-class", "uvloop"]
    return [*line, *_tls(order, "--certfile", "--keyfile")]


def _gunicorn(interface: str, more: str) -> Command:
    def command(program: str, order: Order) -> list[str]:
        line = [*_serve(program, "gunicorn", interface, order, "--bind"), "--workers", "1", "--no-control-socket"]
        return [*line, *more.split(), *_tls(order, "--certfile", "--keyfile")]

    return command


def _bjoern(program: str, order: Order) -> list[str]:
    return [program, "-m", "loadtest.bjoern_serve", f"loadtest.apps:wsgi_{order.app}", str(order.port)]


def _node(program: str, order: Order) -> list[str]:
    return [program, str(HERE / "node.mjs"), order.app, str(order.port), *map(str, order.tls or ())]


def _nginx(program: str, order: Order) -> list[str]:
    """An answer from its configuration, and files by sendfile: what a server can do that runs no application."""
    configuration = order.room / "nginx.conf"
    configuration.write_text(nginx_configuration(order, os.environ.get("RACE_FILE", "")))
    return [program, "-p", str(order.room), "-c", str(configuration)]


def nginx_configuration(order: Order, file: str) -> str:
    """A server of one worker that answers hello, or serves *file* (`large`: its first 64 KiB, beside it)."""
    where = 'return 200 "Hello, world!\\n";'
    if order.app in ("large", "file"):
        served = Path(file if order.app == "file" else f"{file}.large")
        where = f"root {served.parent}; try_files /{served.name} =404;"
    kind = "application/octet-stream" if order.app in ("large", "file") else "text/plain"
    listen = f"listen 127.0.0.1:{order.port}"
    if order.tls:
        listen += f" ssl; ssl_certificate {order.tls[0]}; ssl_certificate_key {order.tls[1]}"
    temporary = "".join(
        f"{name}_temp_path {order.room}/{name}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # Its workers would give up root, and could not read the directory then.
    user = "user root;" if os.geteuid() == 0 else ""
    return f"""
daemon off; worker_processes 1; pid {order.room}/nginx.pid; error_log stderr warn; {user}
events {{ worker_connections 1024; }}
http {{
    access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000; default_type {kind}; charset utf-8;
    {temporary}
    server {{ {listen}; location / {{ {where} }} }}
}}
"""


def _tls(order: Order, certificate: str, key: str) -> Sequence[str]:
    return [certificate, str(order.tls[0]), key, str(order.tls[1])] if order.tls else []


PLAIN = frozenset({"hello", "echo", "large", "upload", "download", "file", "chunks"})
STATIC = frozenset({"hello", "large", "file"})
EVERYTHING = PLAIN | {"websocket"}

NATIVE, ASGI, WSGI = "loadtest.native:{app}", "loadtest.apps:asgi_{app}", "loadtest.apps:wsgi_{app}"

# Threads are asked for by name, because a server's default for them depends on the machine.
FIELD = (
    Entry("prefork native", "prefork", "native", EVERYTHING, _prefork(NATIVE)),
    Entry("prefork ASGI", "prefork", "asgi", EVERYTHING, _prefork(ASGI)),
    Entry("prefork WSGI", "prefork", "wsgi", PLAIN, _prefork(WSGI, "--threads 0")),
    Entry("prefork WSGI, 4 threads", "prefork", "wsgi-threads", PLAIN, _prefork(WSGI, "--threads 4")),
    Entry("granian RSGI", "granian", "native", EVERYTHING, _granian("rsgi")),
    Entry("granian ASGI", "granian", "asgi", EVERYTHING, _granian("asgi")),
    Entry("granian WSGI", "granian", "wsgi", PLAIN, _granian("wsgi", "--blocking-threads 1")),
    Entry("granian WSGI, 4 threads", "granian", "wsgi-threads", PLAIN, _granian("wsgi", "--blocking-threads 4")),
    Entry("uvicorn httptools", "uvicorn", "asgi", EVERYTHING, _uvicorn("--http httptools")),
    Entry("uvicorn h11", "uvicorn", "asgi", PLAIN, _uvicorn("--http h11")),
    Entry("hypercorn", "hypercorn", "asgi", EVERYTHING, _hypercorn),
    Entry("gunicorn asgi", "gunicorn", "asgi", EVERYTHING, _gunicorn("asgi", "-k asgi")),
    Entry(
        "gunicorn gthread, 4 threads", "gunicorn", "wsgi-threads", PLAIN, _gunicorn("wsgi", "-k gthread --threads 4")
    ),
    Entry("gunicorn sync", "gunicorn", "wsgi", PLAIN, _gunicorn("wsgi", "-k sync")),
    Entry("bjoern", "bjoern", "wsgi", PLAIN, _bjoern),
    Entry("node", "node", "native", PLAIN, _node),
    Entry("nginx", "nginx", "none", STATIC, _nginx),
    # In those scenarios only that ask for them by name.
    Entry("prefork native, access log", "prefork", "native", frozenset(), _prefork(NATIVE, is_logged=True)),
    Entry("prefork ASGI, access log", "prefork", "asgi", frozenset(), _prefork(ASGI, is_logged=True)),
)
