"""A program that serves itself: no command line but its own.

    python -m examples.embedded

`serve` turns this process into the master and returns when it was stopped. Each worker is a
fork of it, so what was made before is there in each of them.
"""

import os
import sys

import prefork

GREETING = "served by a program that was started as " + " ".join(sys.argv[:1] or ["python"])


async def handler(request: prefork.Request) -> str:
    return f"{GREETING}\n"


@prefork.cluster.on("listening")
def announce(worker, address):
    print(f"worker {worker.id} answers on {address.url('http')}", flush=True)


if __name__ == "__main__":
    prefork.serve(handler, bind=os.environ.get("BIND", "127.0.0.1:8000"), workers=2)
    print("stopped, and back in the program", flush=True)
