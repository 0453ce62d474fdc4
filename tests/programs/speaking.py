"""Workers that use their standard streams."""

import os
import sys

from prefork import cluster
from tests.programs.telling import obey, say, tell_all

handles = {}


def speaker():
    os.write(1, b"said aloud\n")
    os.write(2, b"said in error\n")


def listener():
    say("read", worker=cluster.worker.id, line=sys.stdin.readline())


def overhear(worker):
    """Say what comes through the pipes of *worker*, whole, when each has ended."""
    handles[worker.id] = worker
    for name in ("stdout", "stderr"):
        output = getattr(worker.process, name)
        if output is not None:
            pieces = []
            output.on("data", pieces.append)
            output.on("end", lambda name=name, pieces=pieces: say("spoken", by=name, text=b"".join(pieces).decode()))


def write(worker, text):
    os.write(handles[worker].process.stdin, text.encode())


if cluster.is_worker:
    speaker()
elif __name__ == "__main__":
    tell_all()
    cluster.on("fork", overhear)
    obey()
    cluster.run()
