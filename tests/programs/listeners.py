"""The console, and workers that ask for listeners."""

import select
import struct

from prefork import cluster
from tests.programs.telling import *  # noqa: F403 - what an order may use
from tests.programs.telling import errno, hear, obey, os, say, socket, sys, tell_all

count = 0
opened = []


async def app(request):
    global count
    count += 1
    return f"worker {cluster.worker.id}\n"


def worker(bind=None, settings=None):
    cluster.worker.on("message", hear)
    if bind is not None:
        cluster.listen(app, bind, **(settings or {}))


def shares(sharing, *binds):
    tries(*binds, settings={"sharing": sharing})


def where(one):
    return one.getsockname() if one.family == socket.AF_UNIX else one.getsockname()[1]


def tries(*binds, settings=None):
    """Ask for each of *binds* in turn, then obey. A number among them is a pipe, and to wait for a byte from it."""
    cluster.worker.on("message", hear)
    for bind in binds:
        if isinstance(bind, int):
            os.read(bind, 1)
            continue
        try:
            one = cluster.listener(bind, **(settings or {}))
        except OSError as error:
            say("failed", worker=cluster.worker.id, kind=type(error).__name__, errno=errno.errorcode.get(error.errno))
        else:
            opened.append(one)
            say("opened", worker=cluster.worker.id, where=where(one), text=str(one.getsockname()))


def echoes(bind, settings=None):
    """A server that is not HTTP."""
    listening = cluster.listener(bind, **(settings or {}))
    say("opened", worker=cluster.worker.id, where=where(listening))
    while True:
        select.select([listening], [], [])
        try:
            connection, _ = listening.accept()
        except BlockingIOError:  # a sibling was faster
            continue
        with connection:
            connection.sendall(f"worker {cluster.worker.id}: ".encode() + connection.recv(100))


def serves(bind, settings=None):
    """cluster.listen, and what it raises."""
    try:
        cluster.listen(app, bind, **(settings or {}))
    except OSError as error:
        say("failed", worker=cluster.worker.id, kind=type(error).__name__, errno=errno.errorcode.get(error.errno))


def backlogs():
    """Of each listening TCP socket here: what ss(8) shows as its Send-Q."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            one = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # none, or none any more
            continue
        with one:
            if one.family == socket.AF_INET and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                # tcp_diag.c: the field tcpi_sacked holds it for a socket in this state.
                found += struct.unpack_from("I", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64), 28)
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:  # who this program shall be
        os.setgroups([])
        os.setgid(int(sys.argv[1]))
        os.setuid(int(sys.argv[1]))
    tell_all()
    obey()
    say("returned", code=cluster.run())
