"""The Autobahn|Testsuite against our WebSockets: `python -m loadtest.autobahn [--cases "1.*,5.*"]`.

Its fuzzing client sends what RFC 6455 and RFC 7692 allow and forbid, about 500 cases,
and judges the answers. It runs under Python 2.7 only, which is looked for under pyenv
(or named with --python), and is installed into the user's cache, outside of any
environment. Prints counts per behaviour and what failed; exits with 1 if something did.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.harness.server import Server

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefork-autobahn"

# The last version that was published for Python 2.7 only; pip finds the rest that goes with it.
SUITE = "autobahntestsuite==0.8.2"

# UNIMPLEMENTED: an offer of compression was declined. RFC 7692 lets a server; zlib cannot compress with 8 bits of window.
PASSED = {"OK", "NON-STRICT", "INFORMATIONAL", "UNIMPLEMENTED"}


def main() -> int:
    arguments = parse()
    suite = install(arguments.python)
    with tempfile.TemporaryDirectory() as directory:
        # Messages of up to 32 MB, since the suite sends 16 MB and means it.
        with Server(arguments.app, workers=1, ws_max_size="32m") as server:
            server.wait_ready(1)
            run(arguments, suite, server.port, Path(directory))
        return report(Path(directory) / "index.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="*", help="cases to run, with commas between: 1.*,5.3,12.1.*; default: all")
    parser.add_argument("--exclude", default="", help="cases to leave out")
    parser.add_argument("--app", default="loadtest.native:websocket", help="or loadtest.apps:asgi_websocket")
    parser.add_argument("--seconds", type=float, default=1800, help="the whole run may take this long")
    parser.add_argument("--python", type=Path, default=python2(), help="an interpreter of Python 2.7")
    return parser.parse_args()


def python2() -> Path:
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    return next(iter(sorted(root.glob("versions/2.7.*/bin/python2.7"))), Path("python2.7"))


def install(python: Path) -> Path:
    """Where the suite is; it is put there the first time."""
    place = CACHE / SUITE
    if not (place / "autobahntestsuite").is_dir():
        print(f"installing {SUITE} into {place}")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--target", place, SUITE], check=True)
    return place


def run(arguments: argparse.Namespace, suite: Path, port: int, directory: Path) -> None:
    specification = {
        "outdir": str(directory),
        "servers": [{"agent": "prefork", "url": f"ws://127.0.0.1:{port}"}],
        "cases": arguments.cases.split(","),
        "exclude-cases": [case for case in arguments.exclude.split(",") if case],
        "exclude-agent-cases": {},
    }
    path = directory / "fuzzingclient.json"
    path.write_text(json.dumps(specification))
    # addsitedir, since PYTHONPATH would not read the .pth file that the suite's namespace packages need.
    start = f"import site; site.addsitedir({str(suite)!r}); from autobahntestsuite.wstest import run; run()"
    command = [arguments.python, "-W", "ignore", "-c", start, "-m", "fuzzingclient", "-s", str(path)]
    with (directory / "wstest.log").open("w+") as output:
        try:
            subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=arguments.seconds,
                check=True,
                cwd=directory,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            output.seek(0)
            raise SystemExit(f"{output.read()[-4000:]}\n{error}") from error


def report(index: Path) -> int:
    """Print what the suite found, and tell whether all of it passed, as an exit code."""
    [cases] = json.loads(index.read_text()).values()
    behaviours = collections.Counter(case["behavior"] for case in cases.values())
    closings = collections.Counter(case["behaviorClose"] for case in cases.values())
    print(f"{len(cases)} cases: {counts(behaviours)}; closing: {counts(closings)}")
    failed = False
    for name, case in sorted(cases.items(), key=lambda item: [int(part) for part in item[0].split(".")]):
        is_failure = case["behavior"] not in PASSED or case["behaviorClose"] not in PASSED
        failed |= is_failure
        if is_failure or case["behavior"] in {"NON-STRICT", "UNIMPLEMENTED"}:
            print(f"{name:12} {case['behavior']:14} closing {case['behaviorClose']}")
    return int(failed)


def counts(found: collections.Counter[str]) -> str:
    return ", ".join(f"{number} {behaviour}" for behaviour, number in found.most_common())


if __name__ == "__main__":
    sys.exit(main())
