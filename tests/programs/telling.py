"""What a program under test says on stdout and obeys from stdin; tests/harness/program.py is the other side.

Every event is one line of JSON written at once, so that lines of several processes never mix. An order is a
line of JSON too: Python to run in the master, or in a worker, to which it goes as a message.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import select
import signal
import socket
import stat
import sys
import traceback

from prefork import cluster

__all__ = [
    "asyncio", "brief", "carry_out", "describe", "errno", "hear", "json", "obey", "os", "say", "signal", "snapshot",
    "socket", "sys", "tell_all", "tell_own",
]  # fmt: skip

EVENTS = ("setup", "fork", "online", "listening", "message", "draining", "disconnect", "exit")

# pipe(7): what is longer than PIPE_BUF may be torn apart by another writer.
LONGEST_LINE = 4096  # bytes

# Seconds between two looks at stdin; the master's loop has no public way to wait for a descriptor.
TURN = 0.005


def say(event, **fields):
    line = json.dumps({"event": event, **fields}, default=str).encode() + b"\n"
    assert len(line) <= LONGEST_LINE, f"{len(line)} bytes are too many for one line: {line[:100]!r}"
    os.write(1, line)


def snapshot(worker):
    """All that a listener can ask of a handle."""
    return {
        "worker": worker.id,
        "pid": worker.pid,
        "state": getattr(worker.state, "name", worker.state),
        "connected": worker.is_connected(),
        "dead": worker.is_dead(),
        "asked": worker.exited_after_disconnect,
        "listed": worker.id in cluster.workers,
    }


def tell_all(cluster=cluster, by="cluster"):
    """Say every event of *cluster*."""
    cluster.on("setup", lambda settings: say("setup", by=by, silent=settings.silent, args=list(settings.args or ())))
    cluster.on("fork", lambda worker: say("fork", by=by, **snapshot(worker)))
    for event in EVENTS[2:]:
        cluster.on(
            event, lambda worker, *args, event=event: say(event, by=by, **snapshot(worker), **named(event, args))
        )


def tell_own(worker):
    """Say every event of one handle."""
    for event in EVENTS[2:]:
        worker.on(event, lambda *args, event=event: say(event, by="handle", **snapshot(worker), **named(event, args)))
    worker.on("drain", lambda: say("drain", **snapshot(worker)))


def named(event, args):
    if event == "listening":
        (address,) = args
        return {"address": str(address)}
    if event == "message":
        message, handle = args
        return {"message": brief(message), "handle": describe(handle)}
    if event == "exit":
        code, signal = args
        return {"code": code, "signal": signal}
    assert not args, f"{event} came with {args}"
    return {}


def brief(message):
    """A message that is short, or the length and the digest of one that is not."""
    text = json.dumps(message, default=repr)
    if len(text) < 500:
        return message
    return {"size": len(message), "digest": digest(message)}


def digest(message):
    return hashlib.md5(message.encode() if isinstance(message, str) else repr(message).encode()).hexdigest()


def describe(handle):
    """What a handle is, by what the kernel says of its descriptor."""
    if handle is None:
        return None
    mode = os.fstat(handle.fileno()).st_mode
    if stat.S_ISFIFO(mode):
        return "pipe"
    if stat.S_ISREG(mode):
        return "file"
    if not stat.S_ISSOCK(mode):
        return "other"
    family = {socket.AF_INET: "tcp", socket.AF_INET6: "tcp6", socket.AF_UNIX: "unix"}[handle.family]
    if handle.type == socket.SOCK_DGRAM:
        return "udp"
    is_listening = handle.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return f"{family} listener" if is_listening else family


# ---- orders ----

_rest = b""


def obey():
    """In the master: run what comes on stdin until it ends."""
    cluster.call_later(TURN, _look)


def _look():
    global _rest
    while select.select([0], [], [], 0)[0]:
        chunk = os.read(0, 65536)
        if not chunk:
            return  # no timer is left behind: `cluster.run` may return
        *lines, _rest = (_rest + chunk).split(b"\n")
        for line in lines:
            _follow(json.loads(line))
    cluster.call_later(TURN, _look)


def _follow(order):
    worker = order.pop("worker")
    if worker is None:
        carry_out(order)
        return
    try:
        cluster.workers[worker].send(order)
    except Exception:
        say("answer", number=order["number"], error=traceback.format_exc()[-2000:])


def carry_out(order, **names):
    """Run the Python of *order* as if it stood in the program, and say what came of it."""
    space = vars(sys.modules["__main__"])
    space.update(names)
    try:
        try:
            code = compile(order["code"], "<order>", "eval")
        except SyntaxError:
            code = compile(order["code"], "<order>", "exec")
        value = eval(code, space)
    except Exception:
        say("answer", number=order["number"], error=traceback.format_exc()[-2000:])
    else:
        say("answer", number=order["number"], value=value)


def hear(message, handle):
    """The "message" listener of a worker that obeys: orders are run, anything else is said."""
    if isinstance(message, dict) and "code" in message:
        carry_out(message, handle=handle)
    else:
        say("heard", worker=cluster.worker.id, message=brief(message), handle=describe(handle))
