"""The command line: `prefork serve APP`, its flags made from the settings.

No value is understood here. A flag is text until `Settings.load` reads it, so that a
flag, a variable and a key of the file are refused in the same words. Whatever prefork
raises leaves as one line on stderr and an exit code; only a bug has a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NoReturn

import click

from prefork.config import SETTINGS, Setting, Settings
from prefork.control.serve import serve_command, version
from prefork.errors import AddressError, ConfigError, PreforkError, TLSError, did_you_mean
from prefork.kinds import Several, Switch

# What a shell expects: 2 is a command that cannot work as it was written, 1 one that failed
# here and now, 128 + SIGINT one that the user interrupted.
MISSPELLED = 2
FAILED = 1
INTERRUPTED = 130

# gunicorn's letters for what is typed most.
SHORT = {"bind": "-b", "workers": "-w"}

# Flags of the peers that are spelt otherwise here.
ELSEWHERE = {
    "--host": "the address is one flag here: --bind HOST:PORT",
    "--port": "the address is one flag here: --bind HOST:PORT",
    "-p": "the address is one flag here: --bind HOST:PORT",
    "--uds": "a unix socket is an address here: --bind unix:/path",
    "--fd": "a descriptor is an address here: --bind fd://N",
    "--factory": "a factory is called by its name here: 'module:factory()'",
    "--app-dir": "it is called --chdir or --pythonpath here",
    "--worker-class": "an application is recognised by its signature here, or by --interface",
    "-k": "an application is recognised by its signature here, or by --interface",
    "--reload": "reloading on change is not there yet",
    "--timeout": "there are several here: --boot-timeout, --head-timeout, --body-timeout, --write-timeout",
    "--ssl-certfile": "it is called --certfile here",
    "--ssl-keyfile": "it is called --keyfile here",
    "--ssl-keyfile-password": "it is called --keyfile-password here",
    "--ssl-certificate": "it is called --certfile here",
    "--ssl-ca-certs": "it is called --client-ca here",
    "--ssl-ca": "it is called --client-ca here",
    "--ca-certs": "it is called --client-ca here",
    "--ssl-cert-reqs": "it is called --client-cert here",
    "--cert-reqs": "it is called --client-cert here",
    "--ssl-client-verify": "it is called --client-cert here",
}

SERVE_HELP = """\
Serve an application with one master and several workers.

APP is module:attribute, module:factory() or a module that has app, application or handler; the current directory is
importable.
"""

SERVE_EPILOG = """\
Every flag is also a variable, PREFORK_WORKERS for --workers, and a key of ./prefork.toml or of [tool.prefork] in
./pyproject.toml. The first one found wins: flag, variable, file, default.

Signals to the master: TERM and INT finish what is in flight, a second INT or QUIT ends at once, USR1 reopens the logs,
TTIN and TTOU add and remove a worker.

Exit codes: 0 stopped as told, 1 it cannot start here (the address is in use), 2 a setting is wrong, 3 the application
did not start, 4 the application cannot be loaded.
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The script `prefork`; *arguments* default to the process's."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command line and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(commands.main(given or ["--help"], prog_name="prefork", standalone_mode=False) or 0)
    except click.ClickException as exc:
        return _complain(_sentence(exc), MISSPELLED)
    except (ConfigError, AddressError, TLSError) as exc:
        return _complain(str(exc), MISSPELLED)
    except PreforkError as exc:
        return _complain(str(exc), FAILED)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED


def _complain(sentence: str, code: int) -> int:
    print(f"prefork: {sentence}", file=sys.stderr)
    return code


def _sentence(exc: click.ClickException) -> str:
    """click's complaint in the words of our own."""
    if isinstance(exc, click.NoSuchOption):
        if exc.option_name in ELSEWHERE:
            return f"there is no flag {exc.option_name}: {ELSEWHERE[exc.option_name]}"
        return f"there is no flag {exc.option_name}{did_you_mean(exc.option_name, _flags(exc.ctx))}"
    message = exc.format_message().rstrip(".")
    return message[:1].lower() + message[1:]


def _flags(context: click.Context | None) -> list[str]:
    parameters = context.command.get_params(context) if context else []
    return [flag for parameter in parameters for flag in parameter.opts + parameter.secondary_opts if flag[0] == "-"]


class Commands(click.Group):
    """The commands; a wrong name is met with the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            if ":" in name:  # uvicorn and gunicorn take the application first
                raise click.UsageError(f"there is no command {name!r}, did you mean 'prefork serve {name}'?")
            raise click.UsageError(f"there is no command {name!r}{did_you_mean(name, self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


class Grouped(click.Command):
    """A command whose help shows its flags in the settings' groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        flags = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        shown = {flag.name: flag.get_help_record(ctx) for flag in flags}
        for group, settings in groupby(SETTINGS.values(), key=lambda setting: setting.group):
            _section(formatter, group, [shown.pop(setting.name) for setting in settings if setting.name != "app"])
        _section(formatter, "Help", list(shown.values()))


def _section(formatter: click.HelpFormatter, title: str, rows: list[tuple[str, str] | None]) -> None:
    with formatter.section(title):
        formatter.write_dl([row for row in rows if row is not None])


def _parameter(setting: Setting) -> click.Parameter:
    """*setting* on the command line: not given is None, everything else is left to `Settings.load`."""
    if setting.name == "app":
        return click.Argument(["app"], required=False, metavar="APP")
    help_text = setting.help if setting.shown_default == "none" else f"{setting.help}  [{setting.shown_default}]"
    if isinstance(setting.kind, Switch):
        return click.Option([f"{setting.flag}/{setting.flag.replace('--', '--no-')}"], default=None, help=help_text)
    return click.Option(
        [setting.flag, SHORT[setting.name]] if setting.name in SHORT else [setting.flag],
        type=click.UNPROCESSED,
        multiple=isinstance(setting.kind, Several),
        default=None,
        metavar=setting.kind.metavar,
        help=help_text,
    )


def _version(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        click.echo(f"prefork {version()}")
        context.exit()


def _serve(**flags: Any) -> int:
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    settings = Settings.load(flags=given)
    code = serve_command(settings, is_last_act=True)
    if code and settings.error_log != "-":  # otherwise the terminal would show nothing at all
        _complain(f"could not start; {settings.error_log} says why", code)
    return code


HELP_NAMES = {"help_option_names": ["-h", "--help"]}

commands = Commands(
    "prefork",
    context_settings=HELP_NAMES,
    help="A pre-fork HTTP server: one master, many workers, for ASGI, WSGI and plain Python handlers.",
    params=[
        click.Option(
            ["--version"], is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version."
        )
    ],
)
commands.add_command(
    Grouped(
        "serve",
        context_settings=HELP_NAMES,
        params=[_parameter(setting) for setting in SETTINGS.values()],
        callback=_serve,
        help=SERVE_HELP,
        short_help="Serve an application with one master and several workers.",
        epilog=SERVE_EPILOG,
    )
)
