"""Workers that use their standard streams."""

import os
import select
import sys

from prefork import cluster
from tests.programs.telling import obey, say, tell_all

handles = {}


def speaker():
    os.write(1, b"said aloud\n")
    os.write(2, b"said in error\n")


def listener():
    say("read", worker=cluster.worker.id, line=sys.stdin.readline())


def spoken(worker):
    """What the pipes of a worker that has ended hold; None where there is no pipe."""
    process = handles[worker].process
    return [pipe and pipe.read().decode() for pipe in (process.stdout, process.stderr)]


def write(worker, text):
    stdin = handles[worker].process.stdin
    select.select([], [stdin], [])
    stdin.write(text.encode())
    stdin.flush()


if cluster.is_worker:
    speaker()
elif __name__ == "__main__":
    tell_all()
    cluster.on("fork", lambda worker: handles.update({worker.id: worker}))
    obey()
    cluster.run()
