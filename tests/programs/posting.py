"""The console, and workers and handles for messages of every kind."""

import tempfile
import threading

from prefork import cluster
from tests.programs.telling import *  # noqa: F403 - what an order may use
from tests.programs.telling import asyncio, brief, describe, hear, obey, os, say, socket, tell_all, tell_own

FLOOD = 40  # messages
made = []  # kept open: the other ends, and what was sent with keep


async def app(request):
    body = await request.body()
    return f"worker {cluster.worker.id}: {request.method} {request.path} {body.decode()}\n"


def worker(bind=None, settings=None):
    cluster.worker.on("message", hear)
    if bind is not None:
        cluster.listen(app, bind, **(settings or {}))


def server(bind="127.0.0.1:0", settings=None):
    """Serves by HTTP what it is handed."""

    def served(message, handle):
        if handle is None:
            hear(message, handle)
        else:
            say("served", worker=cluster.worker.id, taken=cluster.worker.serve(handle))

    cluster.worker.on("message", served)
    cluster.listen(app, bind, **(settings or {}))


def late(gate):
    """Listens for messages only once something comes through the pipe *gate*."""
    os.read(gate, 1)
    cluster.worker.on("message", hear)


async def late_coroutine(gate):
    """The same, while its loop runs."""
    await asyncio.to_thread(os.read, gate, 1)
    cluster.worker.on("message", hear)


async def iterates():
    async for message, handle in cluster.worker.messages():
        say("heard", worker=cluster.worker.id, message=brief(message), handle=describe(handle))
        if message == "enough":
            break
    say("left", worker=cluster.worker.id)


def mirror():
    """Sends back what comes, handles too."""
    cluster.worker.on("message", cluster.worker.send)


def counts(total):
    """Says whether *total* messages {number, text} came whole and in order."""
    expected = iter(range(total))

    def count(message, handle):
        number = next(expected)
        if message["number"] != number or len(message["text"]) != message["size"]:
            say("wrong", expected=number, number=message["number"])
        if number == total - 1:
            say("counted", worker=cluster.worker.id, last=number)

    cluster.worker.on("message", count)


def speaks(sizes):
    for number, size in enumerate(sizes):
        cluster.worker.send({"number": number, "size": size, "text": "x" * size})


def raises():
    raise RuntimeError("on purpose")


def says_goodbye(count, how):
    """*count* messages and then the end, at once."""
    for number in range(count):
        cluster.worker.send(["last words", number, "x" * 1000])
    how()


async def floods(path):
    """asend until all is sent; begins when the fifo *path* is opened from the other side."""
    sent = 0

    async def flood():
        nonlocal sent
        for number in range(FLOOD):
            await cluster.worker.asend([number, "x" * 100_000])
            sent += 1

    with await asyncio.to_thread(open, path):
        task = asyncio.create_task(flood())
    for _ in range(1000):
        await asyncio.sleep(0)
    say("waits", sent=sent)
    await task
    say("flooded", sent=sent)


def make(kind):
    """A handle of *kind*, and what its receiver can be reached by."""
    if kind in ("tcp", "unix"):
        one, other = _tcp_pair() if kind == "tcp" else socket.socketpair()
        made.append(other)
        return one
    if kind == "udp":
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.bind(("127.0.0.1", 0))
        return one
    if kind == "tcp listener":
        return socket.create_server(("127.0.0.1", 0))
    if kind == "pipe":
        reader, writer = os.pipe()
        made.append(os.fdopen(writer, "wb", 0))
        return os.fdopen(reader, "rb", 0)
    if kind == "file":
        one = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it goes to somebody else
        one.write(b"written before")
        one.seek(0)
        return one
    assert kind == "int"
    reader, writer = os.pipe()
    made.append(os.fdopen(writer, "wb", 0))
    return reader


def _tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        other, _ = listening.accept()
    return one, other


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def fork(*args, **options):
    handle = cluster.fork(*args, **options)
    tell_own(handle)
    return handle


if __name__ == "__main__":
    assert threading.active_count() == 1  # the master has none, ever
    tell_all()
    obey()
    say("returned", code=cluster.run())
