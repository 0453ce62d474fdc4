"""The console, and workers that end in every way."""

import re

from prefork import cluster
from tests.programs.telling import *  # noqa: F403 - what an order may use
from tests.programs.telling import asyncio, hear, obey, os, say, signal, sys, tell_all, tell_own

go = asyncio.Event()


async def app(request):
    if request.path == "/wait":
        say("waits", worker=cluster.worker.id)
        await go.wait()
        return "waited\n"
    if request.path == "/soon":
        say("waits", worker=cluster.worker.id)
        await asyncio.sleep(0.5)
        return "soon\n"
    if request.path == "/stuck":
        say("stuck", worker=cluster.worker.id)
        spins()
    return f"worker {cluster.worker.id}\n"


def worker(bind=None, settings=None):
    cluster.worker.on("message", hear)
    if bind is not None:
        cluster.listen(app, bind, **(settings or {}))


def opens(*binds):
    sockets = [cluster.listener(bind) for bind in binds]
    say("opened", worker=cluster.worker.id, ports=[one.getsockname()[1] for one in sockets])
    cluster.worker.run()


def speaks():
    cluster.worker.send("hello")


def returns(): ...


async def returns_later():
    await asyncio.sleep(0)


def exits():
    sys.exit(3)


async def exits_later():
    await asyncio.sleep(0)
    sys.exit(3)


def raises():
    raise RuntimeError("on purpose")


async def raises_later():
    await asyncio.sleep(0)
    raise RuntimeError("on purpose")


def told(number):
    """Says which signal it got, and exits with 5."""

    def caught(number, frame):
        say("caught", number=number)
        sys.exit(5)

    signal.signal(number, caught)
    say("ready")
    signal.pause()


def sleeps():
    say("begun")
    signal.pause()


def spins():
    say("begun")
    while True:
        pass


def stuck_in_c():
    """The regular expression engine never lets go of the interpreter's lock."""
    say("begun")
    re.match("(a+)+$", "a" * 64 + "b")


async def works(seconds):
    say("begun")
    await asyncio.sleep(seconds)


def fork(*args, **options):
    handle = cluster.fork(*args, **options)
    tell_own(handle)
    return handle


def fork_and_wait():
    """A worker that has spoken and ended before the master's loop turns again."""
    os.waitid(os.P_PID, cluster.fork(speaks).pid, os.WEXITED | os.WNOWAIT)


if __name__ == "__main__":
    tell_all()
    obey()
    say("returned", code=cluster.run())
