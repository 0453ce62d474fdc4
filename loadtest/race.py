"""Requests a second of one worker on one core, hello world, beside other servers.

Each server is pinned to one core and wrk to another. All are started first and then
measured in turn, round after round, so that whatever else the machine does hits all
alike. Medians; compare ratios, not numbers.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from statistics import median

from loadtest.rig import Rig, granian, gunicorn, prefork, table, two_cores, uvicorn, wrk

# What a browser sends beside Host when it follows a link.
BROWSER = (
    "Connection: keep-alive",
    "Cache-Control: max-age=0",
    'sec-ch-ua: "Chromium";v="126", "Not/A)Brand";v="8"',
    "sec-ch-ua-mobile: ?0",
    'sec-ch-ua-platform: "Linux"',
    "Upgrade-Insecure-Requests: 1",
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
    "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
    "Sec-Fetch-Site: none",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "Accept-Language: en-GB,en;q=0.9,de;q=0.8",
    "Cookie: session=4f1d2c7a9b8e4d53; theme=dark",
)

KINDS = {"Host only": (), "12 browser headers": BROWSER}

# The first is what the others are compared with.
SERVERS = (
    uvicorn("uvicorn h11", "asgi", 1, "--http h11"),
    uvicorn("uvicorn httptools", "asgi", 1, "--http httptools"),
    prefork("prefork ASGI", "asgi", 1),
    prefork("prefork native", "handler", 1),
    prefork("prefork WSGI, 4 threads", "wsgi", 1, "--threads 4"),
    prefork("prefork WSGI, inline", "wsgi", 1, "--threads 0"),
    gunicorn("gunicorn sync", "wsgi", 1, "-k sync"),
    gunicorn("gunicorn gthread, 4 threads", "wsgi", 1, "-k gthread --threads 4"),
    gunicorn("gunicorn asgi", "asgi", 1, "-k asgi"),
    granian("granian ASGI", "asgi", 1, "--interface asgi"),
    granian("granian WSGI", "wsgi", 1, "--interface wsgi"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.race", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=1, help="of each measurement (default 1)")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="servers whose name has this; commas between several"
    )
    rig, arguments = Rig.from_arguments(parser)
    server_core, wrk_core = two_cores()
    wanted = [launch for launch in SERVERS if any(text in launch.name for text in arguments.only.split(","))]
    with ExitStack() as leave:
        field = [leave.enter_context(rig.start(launch, core=server_core)) for launch in rig.installed(wanted)]
        rates = {(running.launch.name, kind): [] for running in field for kind in KINDS}
        for round_ in range(arguments.rounds + 1):  # the first is the warm-up
            for kind, headers in KINDS.items():
                for running in field:
                    rate = wrk(
                        running.port,
                        seconds=arguments.seconds,
                        connections=arguments.connections,
                        core=wrk_core,
                        headers=headers,
                    )
                    if round_:
                        rates[running.launch.name, kind].append(rate)
    report([running.launch.name for running in field], rates)


def report(names: list[str], rates: dict[tuple[str, str], list[float]]) -> None:
    rows = []
    for name in names:
        row = [name]
        for kind in KINDS:
            mine, first = rates[name, kind], rates[names[0], kind]
            # Per round, since a round's measurements are neighbours in time.
            ratio = median(a / b for a, b in zip(mine, first, strict=True))
            row += [f"{median(mine):.0f}", f"{min(mine):.0f}-{max(mine):.0f}", f"{ratio:.2f}"]
        rows.append(row)
    columns = [heading for kind in KINDS for heading in (f"{kind}: req/s", "range", "ratio")]
    table(("server", *columns), rows)
    print(f"ratio: median over the rounds of the ratio to {names[0]}")


if __name__ == "__main__":
    sys.exit(main())
