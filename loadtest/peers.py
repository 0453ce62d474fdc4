"""One environment for each server of the race, so that what one wants installed never meets what another wants.

    python -m loadtest.peers --python ~/.pyenv/versions/3.13.0/bin/python

makes them for one interpreter, in a directory of the user's cache, from the `peers`
extra in pyproject.toml: each of its requirements becomes a virtual environment named
after its package, with its COMPANIONS. prefork's own holds this checkout, editable,
with the extras that it runs with. What is there already is kept (`--renew` makes it
again), and what can not be installed is told in one line and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What a peer is fast with, but does not ask for itself.
COMPANIONS = {"gunicorn": ("uvloop", "gunicorn_h1c>=0.4.1")}

# Of prefork's own extras, those that no server runs with.
WORKSHOP = {"test", "dev", "peers", "charts"}

# A peer without a wheel is compiled.
PATIENCE = 600.0  # seconds

# The packages whose versions make a difference worth telling, beside the peers themselves.
TOLD = ("uvloop", "h11", "httptools", "websockets", "wsproto", "gunicorn_h1c")


@dataclass(frozen=True, slots=True)
class Environments:
    """The environments of one interpreter: *home* has one directory for each server."""

    home: Path
    interpreter: str
    version: str

    @classmethod
    def of(cls, interpreter: str | Path | None = None, where: Path | None = None) -> Environments:
        """Those for *interpreter* (ours), below *where* (a directory of the user's cache)."""
        interpreter = str(interpreter or sys.executable)
        program = "import sys; print(sys.implementation.name, sys.version.split()[0])"
        try:
            done = subprocess.run([interpreter, "-c", program], capture_output=True, text=True, check=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as exc:
            raise SystemExit(f"{interpreter} is not a Python that runs: {exc}") from None
        implementation, version = done.stdout.split()
        return cls((where or _cache()).absolute() / f"{implementation}-{version}", interpreter, version)

    def python(self, package: str) -> Path:
        """The interpreter of *package*'s environment, whether it is there or not."""
        return self.home / package / "bin" / "python"

    def has(self, package: str) -> bool:
        return (self.home / package / "made").exists()

    def make(self, package: str, requirements: list[str]) -> str:
        """'' once *package*'s environment is there, else why it can not be made."""
        place = self.home / package
        shutil.rmtree(place, ignore_errors=True)
        commands = (
            [self.interpreter, "-m", "venv", place],
            [self.python(package), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
        )
        for command in commands:
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
                why = "" if done.returncode == 0 else _reason(done.stderr or done.stdout)
            except (OSError, subprocess.TimeoutExpired) as exc:
                why = str(exc)
            if why:
                shutil.rmtree(place, ignore_errors=True)
                return why
        (place / "made").write_text("\n".join(requirements) + "\n")
        return ""

    def versions(self, package: str) -> dict[str, str]:
        """Of *package* and of what it leans on, as far as its environment has them."""
        if not self.has(package):
            return {}
        program = (
            "import json\nfrom importlib import metadata\nfound = {}\n"
            f"for name in {(package, *TOLD)!r}:\n"
            "    try: found[name] = metadata.version(name)\n"
            "    except metadata.PackageNotFoundError: pass\n"
            "print(json.dumps(found))"
        )
        command = [self.python(package), "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, cwd="/")
        versions: dict[str, str] = json.loads(done.stdout)
        return versions


def wanted() -> dict[str, list[str]]:
    """What to install for each server, by the name of its package: prefork, then the `peers` extra's order."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    own = ",".join(sorted(set(extras) - WORKSHOP))
    found = {"prefork": ["-e", f"{ROOT}[{own}]" if own else str(ROOT)]}
    for requirement in extras["peers"]:
        package = re.match(r"[\w.-]+", requirement)[0].lower()
        found[package] = [requirement, *COMPANIONS.get(package, ())]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.peers", description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--only", default="", metavar="NAMES", help="packages, commas between several (default all)")
    parser.add_argument("--renew", action="store_true", help="make again what is there already")
    arguments = parser.parse_args()
    environments = Environments.of(arguments.python, arguments.peers)
    only = {name for name in arguments.only.split(",") if name}
    for package, requirements in wanted().items():
        if only and package not in only:
            continue
        is_there = environments.has(package) and not arguments.renew
        if why := "" if is_there else environments.make(package, requirements):
            print(f"left out: {package}: {why}", flush=True)
            continue
        versions = ", ".join(f"{name} {version}" for name, version in environments.versions(package).items())
        print(f"{environments.python(package)}: {versions}", flush=True)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which environments."""
    parser.add_argument("--python", metavar="PATH", help="the interpreter of all servers (default: the running one)")
    parser.add_argument("--peers", type=Path, metavar="DIR", help=f"where their environments are (default: {_cache()})")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefork-peers"


def _reason(output: str) -> str:
    """The line of a compiler's or of pip's *output* that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no reason given"]
    return next((line for line in lines if re.search(r"(fatal )?error: (?!subprocess)", line)), lines[-1])


if __name__ == "__main__":
    sys.exit(main())
